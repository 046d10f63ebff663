"""Markdown files, one document each: as they stand. `plain.Plain` makes text of them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from attrs import frozen

from nanovllm_core.contracts import Accept, Record, Refuse, Source, Verdict
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl

SUFFIXES = (".md", ".markdown")


@frozen(kw_only=True, eq=False)
class Markdown:
    """Markdown files (.md, .markdown), one record each: `{"markdown": text}`."""

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and source.name.lower().endswith(SUFFIXES):
            return Accept(why="Markdown file")
        return Refuse(f"not a {' or '.join(SUFFIXES)} file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record]:
        """The file as one record. Raises DataError where it is not UTF-8."""
        return _records(source)


def _records(source: Source) -> Iterator[Record]:
    with open(source.path, "rb") as file:
        data = file.read()
    skip = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    yield Record(value={"markdown": decoded(data[skip:], source, 1, skip)}, source=source.name, byte=skip)


def decoded(data: bytes, source: Source, line: int, byte: int) -> str:
    """`data`, which begins at this line and byte of the source, as text. Raises DataError with file, line and byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise DataError(
            f"{source.name}:{line}:{byte + e.start}: not valid UTF-8 ({e.reason}); save the file as UTF-8"
        ) from e
