"""Strict JSON over text in memory: what Python's parser lets pass is refused, with the exact place.

Refused beyond malformed JSON: NaN and Infinity, a key given twice (Python keeps the last), half a surrogate pair (it
cannot be encoded again), nesting beyond 64 (Python's parser breaks near 1,000), integers that Python will not convert.

The C parser does the work (about 400 MB/s); only a text that it or a cheap check rejects is scanned again, token by
token, to find the place.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nanovllm_readers.reasons import of_parser

DEPTH = 64  # nested arrays and objects
MARGIN = (
    16  # characters; nothing that the end of a text can cut in two is longer, but for strings; reasons look no further
)
SPACE = re.compile(r"[ \t\n\r]*")
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.DOTALL)
_PART = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]|[^\[\]{},"]+', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CONSTANTS = ("NaN", "Infinity", "-Infinity")


class Problem(Exception):
    """What is wrong, and at which character; `open` when text that is still to come might mend it."""

    def __init__(self, position: int, reason: str, *, open: bool = False) -> None:
        super().__init__(reason)
        self.position, self.reason, self.open = position, reason, open


class _Unlocated(ValueError):
    """Something is wrong that the parser does not place."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Unlocated("a key is given twice")
    return result


def _constant(name: str) -> Any:
    raise _Unlocated(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def skip_space(text: str, start: int) -> int:
    """The first position at or after `start` that is not JSON white space."""
    found = SPACE.match(text, start)
    return found.end() if found else start


def parse(text: str, start: int = 0, *, final: bool = True) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends. Raises Problem. `final`: no more text is to come."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as e:
        if not final and (e.pos > len(text) - MARGIN or e.msg.startswith("Unterminated string")):
            raise Problem(e.pos, e.msg, open=True) from e
        early = _locate(text, start, e.pos)  # what stands before may be worse than where the parser stopped
        raise early or Problem(e.pos, of_parser(e.msg, text, start, e.pos)) from e
    except (ValueError, RecursionError) as e:
        if not final and text[-1].isdigit():  # perhaps an integer that goes on
            raise Problem(start, str(e), open=True) from e
        raise _locate(text, start, len(text)) or Problem(start, str(e)) from e
    if end + len("e+") >= len(text) and not final:  # perhaps a number that goes on
        raise Problem(start, "the text ends with the value", open=True)
    deep = text.count("[", start, end) + text.count("{", start, end) > DEPTH
    if (deep or _SURROGATE.search(text, start, end)) and not _sound(value) and (found := _locate(text, start, end)):
        raise found
    return value, end


def skip(text: str, start: int) -> int | None:
    """Where the value ends that begins at `start` and `parse` refused; None where quotes and brackets do not tell."""
    open_: list[str] = []
    position = start
    while found := _PART.match(text, position):
        word, position = found.group(), found.end()
        if word in "[{":
            open_.append("]" if word == "[" else "}")
        elif word in "]},":
            if not open_:
                return found.start() if word != "}" else None
            if word != "," and open_.pop() != word:
                return None
            if not open_:
                return position
    return None


def _sound(value: Any) -> bool:
    """Whether a parsed value is shallow enough and all its strings can be encoded."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not _encodable(item):
                return False
        elif isinstance(item, dict | list):
            if depth >= DEPTH:
                return False
            parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            stack.extend((part, depth + 1) for part in parts)
    return True


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _locate(text: str, start: int, end: int) -> Problem | None:
    """The first thing between `start` and `end` that strict JSON refuses and the parser does not place."""
    keys: list[set[str] | None] = []  # one entry an open bracket: an object's keys so far, or None for an array
    position = start
    while (token := TOKEN.search(text, position)) and token.start() < end:
        word, position = token.group(), token.end()
        if word in "[{":
            keys.append(set() if word == "{" else None)
            if len(keys) > DEPTH:
                return Problem(token.start(), f"arrays and objects nested deeper than {DEPTH}")
        elif word in "]}":
            if keys:
                keys.pop()
            if not keys:
                return None  # the value is over
        elif word.startswith(_CONSTANTS):  # also as the beginning of a longer word: the parser goes no further
            constant = next(c for c in _CONSTANTS if word.startswith(c))
            return Problem(token.start(), f"{constant} is not JSON")
        elif word.lstrip("-").isdigit() and len(word) > 4000:
            try:
                int(word)
            except ValueError:
                return Problem(token.start(), f"an integer of {len(word):,} digits")
        elif word.startswith('"'):
            try:
                string = json.loads(word)
            except json.JSONDecodeError:
                return None  # the parser's own error says it better
            if not _encodable(string):
                return Problem(token.start(), "a string holds half of a surrogate pair, which is no character")
            follows = skip_space(text, position)
            seen = keys[-1] if keys else None
            if seen is not None and text[follows : follows + 1] == ":":
                if string in seen:
                    return Problem(token.start(), f"the key {_short(string)} is given twice in one object")
                seen.add(string)
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
