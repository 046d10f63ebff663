"""JSON files: an array of records or a single record; JSON Lines: one line, one record. Strict (`strict.py`), UTF-8.

A `.jsonl` file is read line by line. A `.json` file is held in memory as text, but its array is parsed record by
record, so that what the records cost is not added to that.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from attrs import frozen

from nanovllm_core.contracts import Accept, Record, Refuse, Source, Verdict
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_readers.strict import Problem, parse, skip_space

LINES = (".jsonl", ".ndjson")


@frozen(kw_only=True, eq=False)
class Json:
    """JSON files (.json): an array of records, or one record."""

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and source.name.lower().endswith(".json"):
            return Accept(why=".json file")
        return Refuse("not a .json file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record]:
        """The array's elements, or the one value. Raises DataError at what is no strict JSON."""
        return _whole(source)


@frozen(kw_only=True, eq=False)
class Jsonl:
    """JSON Lines files (.jsonl, .ndjson): one line, one record; blank lines are left out."""

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and source.name.lower().endswith(LINES):
            return Accept(why="JSON Lines file")
        return Refuse(f"not a {' or '.join(LINES)} file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record]:
        """One record a line. Raises DataError at what is no strict JSON."""
        return _lines(source)


def _lines(source: Source) -> Iterator[Record]:
    byte, index = 0, 0
    with open(source.path, "rb") as file:
        for number, raw in enumerate(file, 1):  # binary files break at \n alone
            begin, byte = byte, byte + len(raw)
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                raw, begin = raw[len(codecs.BOM_UTF8) :], begin + len(codecs.BOM_UTF8)
            text = _decode(source, raw.rstrip(b"\r\n"), number, begin)
            start = skip_space(text, 0)
            if start == len(text):
                continue
            try:
                value, end = parse(text, start)
                if (rest := skip_space(text, end)) < len(text):
                    raise Problem(rest, "more follows after the line's record; JSON Lines has one record a line")
            except Problem as e:
                at = begin + len(text[: e.position].encode("utf-8", "surrogatepass"))
                raise DataError(f"{source.name}:{number}:{at}: {e.reason}") from e
            yield Record(value=value, source=source.name, line=number, index=index, byte=begin + start)
            index += 1


def _whole(source: Source) -> Iterator[Record]:
    with open(source.path, "rb") as file:
        raw = file.read()
    skip = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    text = _decode(source, raw[skip:] if skip else raw, 1, skip)
    ascii_only = len(text) == len(raw) - skip
    done, byte = 0, skip  # characters so far and the byte where they end

    def to_byte(position: int) -> int:
        nonlocal done, byte
        if ascii_only:
            return skip + position
        byte += len(text[done:position].encode("utf-8"))
        done = position
        return byte

    try:
        for index, (value, position) in enumerate(_elements(text)):
            yield Record(value=value, source=source.name, index=index, byte=to_byte(position))
    except Problem as e:
        at = to_byte(e.position)
        line = raw.count(b"\n", 0, at) + 1
        raise DataError(f"{source.name}:{line}:{at}: {e.reason}") from e


def _elements(text: str) -> Iterator[tuple[object, int]]:
    """The records of a `.json` text with the character where each begins. Raises Problem."""
    start = skip_space(text, 0)
    if start == len(text):
        raise Problem(start, "the file is empty; a .json file holds an array of records or one record")
    if text[start] != "[":
        value, end = parse(text, start)
        yield value, start
        if (rest := skip_space(text, end)) < len(text):
            raise Problem(rest, "more follows after the file's value; if each line is a record, name the file .jsonl")
        return
    position = skip_space(text, start + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            value, end = parse(text, position)
            yield value, position
            position = skip_space(text, end)
            mark = text[position : position + 1]
            if mark not in (",", "]"):
                raise Problem(position, "expecting ',' or ']' after a record of the array")
            position += 1
            if mark == "]":
                break
            position = skip_space(text, position)
    if (rest := skip_space(text, position)) < len(text):
        raise Problem(rest, "more follows after the file's array; if each line is a record, name the file .jsonl")


def _decode(source: Source, raw: bytes, line: int, byte: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line += raw.count(b"\n", 0, e.start)
        raise DataError(f"{source.name}:{line}:{byte + e.start}: not valid UTF-8 ({e.reason}); JSON is UTF-8") from e
