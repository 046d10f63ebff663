"""JSON files: an array of records or a single record; JSON Lines: one line, one record. Strict (`strict.py`).

Both are streams: memory holds one record and a piece, also of an array that is all one line. A broken record is yielded
as Damage, and reading goes on: in JSON Lines with the next line; in an array behind the record's last bracket, as long as
its quotes and brackets are in order and a comma or the array's end follows, else the rest of the file is left out with it.
Bytes that are no text damage the record that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from attrs import field, frozen

from nanovllm_core.contracts import Accept, Damage, Record, Refuse, Source, Verdict
from nanovllm_core.data.decoding import Undecodable
from nanovllm_core.data.opening import Opened, content_name, opened
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.options import at_least
from nanovllm_readers.reasons import COMMA, of_nul, of_number
from nanovllm_readers.strict import Problem, parse, skip_space
from nanovllm_readers.window import Window

LINES = (".jsonl", ".ndjson")
LIMIT = 1 << 30  # the text of a record; parsed, it takes about three times that
PIECE = 1 << 20  # bytes of a line read at once


@frozen(kw_only=True, eq=False)
class Json:
    """JSON files (.json, also .gz or .zst): an array of records, or one record.

    max_record: characters; a longer record is refused, because a record is held in memory
    """

    max_record: int = field(default=LIMIT, validator=at_least(1))

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and content_name(source.name).endswith(".json"):
            return Accept(why=".json file")
        return Refuse("not a .json file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record | Damage]:
        """The array's elements, or the one value; Damage for what is no strict JSON."""
        return _whole(source, self.max_record)


@frozen(kw_only=True, eq=False)
class Jsonl:
    """JSON Lines files (.jsonl, .ndjson, also .gz or .zst): one line, one record; blank lines are left out.

    max_record: bytes; a longer line is refused, because a record is held in memory
    """

    max_record: int = field(default=LIMIT, validator=at_least(1))

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and content_name(source.name).endswith(LINES):
            return Accept(why="JSON Lines file")
        return Refuse(f"not a {' or '.join(LINES)} file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record | Damage]:
        """One record a line; Damage for a line that is no strict JSON."""
        return _lines(source, self.max_record)


# ---------------------------------------------------------------- JSON Lines


def _lines(source: Source, limit: int) -> Iterator[Record | Damage]:
    with opened(source) as content:
        byte, index = content.start, 0
        for number, (raw, size) in enumerate(_raw_lines(content, limit), 1):
            begin, byte = byte, byte + size
            at, reason = begin, ""
            try:
                if len(raw) < size:
                    at, reason = begin, f"a line of {size:,} bytes; `max_record` on the jsonl reader allows more"
                else:
                    text = raw.decode(content.codec).rstrip("\r\n")
                    if (start := skip_space(text, 0)) == len(text):
                        continue
                    at = begin + _bytes(text[:start], content.codec)
                    value, end = parse(text, start)
                    if (rest := skip_space(text, end)) < len(text):
                        more = "more follows after the line's record; JSON Lines has one record a line"
                        raise Problem(rest, of_number(text, rest) or more)
            except UnicodeDecodeError as e:
                at, reason = begin + e.start, f"not valid {content.codec} ({e.reason})"
                if content.unit == 1 and (first := raw.find(0, 0, e.start)) >= 0:
                    at, reason = begin + first, of_nul(raw, begin)
            except Problem as e:
                at, reason = begin + _bytes(text[: e.position], content.codec), e.reason
                if text[e.position : e.position + 1] == "\0":
                    reason = of_nul(raw if content.unit == 1 else b"", begin)
            if reason:
                yield Damage(source=source.name, reason=reason, line=number, index=index, byte=at)
            else:
                yield Record(value=value, source=source.name, line=number, index=index, byte=at)
            index += 1


def _bytes(text: str, codec: str) -> int:
    return len(text.encode(codec, "surrogatepass"))


def _raw_lines(content: Opened, limit: int) -> Iterator[tuple[bytes, int]]:
    """Each line with its end, and its size; a line longer than `limit` comes empty."""
    parts: list[bytes] = []
    size = 0
    for part, ended in _by_newline(content.file) if content.unit == 1 else _by_wide_newline(content):
        size += len(part)
        if size <= limit:
            parts.append(part)
        if ended:
            yield b"".join(parts) if size <= limit else b"", size
            parts, size = [], 0


def _by_newline(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Pieces of lines, and whether the line ends there."""
    while piece := file.readline(PIECE):
        yield piece, piece.endswith(b"\n")
    yield b"", True


def _by_wide_newline(content: Opened) -> Iterator[tuple[bytes, bool]]:
    newline, unit, buffer = "\n".encode(content.codec), content.unit, b""
    while piece := content.file.read(PIECE):
        buffer += piece
        begin = at = 0
        while (at := buffer.find(newline, at)) >= 0:
            if at % unit:  # two characters that share the bytes
                at += 1
            else:
                at += unit
                yield buffer[begin:at], True
                begin = at
        whole = max(begin, len(buffer) - len(buffer) % unit)
        if begin < whole:
            yield buffer[begin:whole], False
        buffer = buffer[whole:]
    yield buffer, True


# ---------------------------------------------------------------- JSON


def _whole(source: Source, limit: int) -> Iterator[Record | Damage]:
    with opened(source) as content:
        window = Window(content, limit)
        index = 0
        try:
            for found in _values(window):
                if isinstance(found, _Broken):
                    yield found.damage(source.name, index)
                else:
                    yield Record(value=found[0], source=source.name, index=index, byte=found[1])
                index += 1
        except _Broken as e:
            yield e.damage(source.name, index, last=True)
        except Undecodable as e:
            begins = window.byte(window.position)
            yield Damage(source.name, e.reason, e.line, index, e.byte, last=True, begins=begins)


class _Broken(Exception):
    """A Problem with its place in the file, which the window that slides on forgets."""

    def __init__(self, window: Window, problem: Problem) -> None:
        problem = window.first(problem)
        super().__init__(problem.reason)
        self.begins = window.byte(window.position)  # what is lost: the value, or from here on
        self.reason, self.byte, self.line = problem.reason, window.byte(problem.position), window.line(problem.position)

    def damage(self, source: str, index: int, *, last: bool = False) -> Damage:
        begins = self.begins if last else None
        return Damage(source, self.reason, self.line, index, self.byte, last=last, begins=begins)


def _values(window: Window) -> Iterator[tuple[object, int] | _Broken]:
    """The records with the byte where each begins, and what stands in place of one. Raises _Broken when that is all."""
    try:
        first = window.space()
        if not first:
            return
        if first != "[":
            yield window.value()
            what = "value"
        else:
            what = "array"
            window.position += 1
            mark = window.space()
            while mark != "]":
                yield _element(window)
                mark = window.space()
                if mark not in (",", "]"):  # also at the end, which is ""
                    number = of_number(window.text, window.position)
                    raise Problem(window.position, number or "expecting ',' or ']' after a record of the array")
                if mark == ",":
                    window.position += 1
                    if (mark := window.space()) == "]":
                        yield _Broken(window, Problem(window.position, f"expecting a value, found ']'; {COMMA}"))
            window.position += 1
        if window.space():
            more = f"more follows after the file's {what}; if each line is a record, name the file .jsonl"
            raise Problem(window.position, of_number(window.text, window.position) or more)
    except Problem as e:
        raise _Broken(window, e) from e


def _element(window: Window) -> tuple[object, int] | _Broken:
    """The next value; what is wrong with it, where the end can be told; else raises _Broken."""
    try:
        return window.value()
    except Problem as e:
        broken = _Broken(window, e)
    try:
        if window.skip() and window.space() in (",", "]"):
            return broken
    except Undecodable:
        pass
    raise broken
