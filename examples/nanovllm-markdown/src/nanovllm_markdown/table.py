"""CSV files: a header, then one record a row, by column.

Read line by line: memory holds one row. A cell holds at most 131,072 characters, the limit of Python's `csv`, which
could only be raised for the whole process. Line ends are LF or CRLF; quoted cells may hold them.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from typing import Any

from attrs import define, field, frozen

from nanovllm_core.contracts import Accept, Record, Refuse, Source, Verdict
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_markdown.readers import decoded


def _one_character(instance: Any, attribute: Any, value: object) -> None:
    if not isinstance(value, str) or len(value) != 1 or value in '"\r\n':
        raise ValueError(f"got {value!r}, expected one character, such as ',' or ';'")


@frozen(kw_only=True, eq=False)
class Csv:
    """CSV files (.csv) with a header: one row, one record, by column; blank lines are left out.

    delimiter: what separates the cells
    """

    delimiter: str = field(default=",", validator=_one_character)

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and source.name.lower().endswith(".csv"):
            return Accept(why=".csv file")
        return Refuse("not a .csv file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record]:
        """One record a row. Raises DataError for a row that does not fit the header, or is no sound CSV."""
        return _rows(source, self.delimiter)


@define
class _Lines:
    """A file's lines as text, and where the next one begins."""

    source: Source
    line: int = 1
    byte: int = 0

    def __iter__(self) -> Iterator[str]:
        with open(self.source.path, "rb") as file:
            for raw in file:
                begin, self.byte = self.byte, self.byte + len(raw)
                skip = len(codecs.BOM_UTF8) if self.line == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                text = decoded(raw[skip:], self.source, self.line, begin + skip)
                self.line += 1
                yield text


def _rows(source: Source, delimiter: str) -> Iterator[Record]:
    lines = _Lines(source)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    index = 0
    while True:
        line, byte = lines.line, lines.byte  # where the row begins
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise DataError(f"{source.name}:{line}:{byte}: no sound CSV ({e})") from e
        if row is None:
            break
        if not row:
            continue
        if not header:
            header = row
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{source.name}:{line}:{byte}: the header names column {twice[0]!r} twice")
            continue
        if len(row) != len(header):
            raise DataError(
                f"{source.name}:{line}:{byte}: the row has {len(row)} cells, the header {len(header)} "
                f"({', '.join(header)}); is {delimiter!r} the delimiter?"
            )
        yield Record(value=dict(zip(header, row, strict=True)), source=source.name, line=line, index=index, byte=byte)
        index += 1
