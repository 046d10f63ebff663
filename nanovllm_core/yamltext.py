"""YAML text to plain data, keeping the place of every value; and back.

YAML has two traps that configuration files fall into: scalars that are not what they seem (`on`, `012`, `5e-5`) and
documents that are more than data (tags, aliases that unfold without end, keys that silently win over others). Read
here are PyYAML's events, one by one, so that the core schema of YAML 1.2 holds for plain scalars, and whatever is
more than data is refused where it stands. The price is PyYAML's Python scanner, about 300 KB/s: a recipe takes
milliseconds.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from attrs import field, frozen

from nanovllm_core.errors import RecipeError
from nanovllm_core.files import sibling

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+@-]*( [A-Za-z0-9_/.+@-]+)*")  # strings that need no quotes
_ESCAPED = re.compile('[\\x00-\\x1f"\\\\\\x7f-\\xa0\u2028\u2029\ufeff\ufffe\uffff]')
_SHORT = MappingProxyType({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"})
_HINTS = MappingProxyType(
    {  # part of PyYAML's message -> how to mend it
        r"character '\t'": "a tab; indent and separate with spaces",
        "mapping values are not allowed": "the indentation is off, or a value holds ': ' and needs quotes",
        "while scanning an alias": "aliases are not allowed; put quotes around a string that begins with '*'",
        "while scanning an anchor": "anchors are not allowed; put quotes around a string that begins with '&'",
        "that cannot start any token": "put quotes around a string that begins with this character",
        "found unexpected end of stream": "a quote that is not closed",
        "while parsing a flow": "a bracket that is not closed, or a comma is missing",
        "could not find expected ':'": "a line that is neither `key: value` nor `- item`",
    }
)


@frozen
class Place:
    """Where something stands; line and column count from 1, line 0 means that only the file (or flag) is known."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@frozen
class Text:
    """Data read from a text, and where each value of it stood."""

    data: Any = None
    file: str = "recipe"
    places: dict[KeyPath, Place] = field(factory=dict)  # of each value
    keys: dict[KeyPath, Place] = field(factory=dict)  # of each mapping key

    def place(self, path: KeyPath) -> Place:
        """Place of the value at `path`, or of the nearest value around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return Place(self.file)

    def key_place(self, path: KeyPath) -> Place:
        """Place of the key that `path` ends with, else as `place`."""
        return self.keys.get(path) or self.place(path)


def read(path: Path | str, *, tabs: bool = False) -> Text:
    """The data of a YAML file. Raises RecipeError when it is missing, too big, not UTF-8, or not plain data.

    `tabs`: they count as spaces, as in JSON, which has them between values alone.
    """
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file{sibling(Path(path))}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name the recipe file in it") from None
    except (OSError, ValueError) as e:  # ValueError: a name that no system allows
        raise RecipeError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e
    _limit(len(raw), str(path))
    try:
        text = raw.decode("utf-8")
        return parse(text.replace("\t", " ") if tabs else text, str(path))
    except UnicodeDecodeError as e:
        before = raw[: e.start].decode("utf-8")
        place = Place(str(path), before.count("\n") + 1, len(before) - before.rfind("\n"))
        why = "it looks like UTF-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else e.reason
        raise RecipeError(f"{place}: byte {e.start} is not UTF-8 ({why}); save the file as UTF-8") from None


def parse(text: str, file: str) -> Text:
    """The data of a YAML text; `file` names it in places. Raises RecipeError with place and reason."""
    text = text.removeprefix("\ufeff")
    _limit(len(text.encode("utf-8", "surrogatepass")), file)
    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader), file).read()
    except yaml.reader.ReaderError as e:
        before = text[: e.position]
        place = Place(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise RecipeError(f"{place}: character U+{ord(text[e.position]):04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as e:
        open_end = "found unexpected end of stream" in (e.problem or "")  # then the beginning is what to look at
        mark = (e.context_mark if open_end else e.problem_mark) or e.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
        problem = ", ".join(part for part in (e.context, e.problem) if part)
        hint = next((f": {hint}" for part, hint in _HINTS.items() if part in problem), "")
        raise RecipeError(f"{place}: not valid YAML ({problem}){hint}") from None


def _limit(size: int, file: str) -> None:
    if size > MAX_BYTES:
        raise RecipeError(f"{file}: larger than 1 MB; a recipe is a short text")


class _Reader:
    """Builds data from events; every refusal carries its place."""

    def __init__(self, events: Iterator[Any], file: str) -> None:
        self.events, self.file = events, file
        self.places: dict[KeyPath, Place] = {}
        self.keys: dict[KeyPath, Place] = {}

    def read(self) -> Text:
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return Text(None, self.file, {(): Place(self.file, 1, 1)})
        data = self.value(next(self.events), ())
        next(self.events)  # document end
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            self.refuse(event, "a second document begins; a recipe is one document")
        return Text(data, self.file, self.places, self.keys)

    def at(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def refuse(self, event: Any, why: str) -> NoReturn:
        raise RecipeError(f"{self.at(event)}: {why}")

    def value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, f"alias *{event.anchor} is not allowed; write the value out")
        if event.anchor is not None:
            self.refuse(event, f"anchor &{event.anchor} is not allowed; write the value out where it is needed")
        if event.tag is not None:
            self.refuse(event, f"tag {event.tag} is not allowed; a recipe holds plain data")
        self.places[path] = self.at(event)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if len(path) >= MAX_DEPTH:
            self.refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*path, len(items))))
        return items

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            if key in items:
                first = self.keys[(*path, key)]
                self.refuse(event, f"key {key!r} appears twice (first at line {first.line}); keep one")
            self.keys[(*path, key)] = self.at(event)
            items[key] = self.value(next(self.events), (*path, key))
        return items

    def key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            if isinstance(event, yaml.AliasEvent):
                self.value(event, ())
            self.refuse(event, "a key must be a string, not a list or mapping")
        if event.anchor is not None or event.tag is not None:
            self.refuse(event, "a key carries no anchor and no tag")
        if event.value == "<<" and event.style is None:
            self.refuse(event, "merge key << is not allowed; write the keys out")
        key = self.scalar(event)
        if not isinstance(key, str):
            self.refuse(event, f"key {event.value or 'null'} must be a string; put quotes around it")
        return key

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        if _SURROGATE.search(text):
            self.refuse(event, "half of a surrogate pair is no character; write the character itself")
        if event.style is not None:
            return text
        try:
            return resolve(text)
        except ValueError as e:
            self.refuse(event, f"{text[:40]}: {e}")


def resolve(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means in the core schema of YAML 1.2. Raises ValueError for what no number can hold."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.fullmatch(text):
            if len(text) > 4000:  # CPython converts at most 4,300 digits by default
                raise ValueError("an integer of more than 4,000 digits is not allowed")
            return int(text, base)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("numbers must be finite; leave the key out or use null where that is allowed")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError("this number is too large")
        return number
    return text


def dump(data: Any) -> str:
    """Block-style YAML that `parse` reads back as equal data: str, int, finite float, bool, None, list, dict[str, ...].

    Raises ValueError for anything else, and for nests deeper than MAX_DEPTH.
    """
    return "\n".join(_lines(data, 0)) + "\n"


def _lines(data: Any, depth: int) -> list[str]:
    if not isinstance(data, Mapping | list | tuple) or not data:
        return [_scalar(data)]
    if depth >= MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    lines: list[str] = []
    if not isinstance(data, Mapping):
        for item in data:
            first, *rest = _lines(item, depth + 1)
            lines += [f"- {first}", *(f"  {line}" for line in rest)]
        return lines
    for key, value in data.items():
        if not isinstance(key, str):
            raise ValueError(f"key {key!r} is no string")
        name = _scalar(key)
        if len(name) > 1000:  # YAML bounds keys written before their colon to 1,024 characters
            lines.append(f"? {name}")
            name = ""
        inner = _lines(value, depth + 1)
        nested = isinstance(value, Mapping | list | tuple) and len(value) > 0
        lines += [f"{name}:", *(f"  {line}" for line in inner)] if nested else [f"{name}: {inner[0]}"]
    return lines


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise ValueError(f"{value!r} holds half of a surrogate pair")
        if _PLAIN.fullmatch(value) and not value.startswith("...") and isinstance(_read(value), str):
            return value
        return '"' + _ESCAPED.sub(lambda m: _SHORT.get(m[0]) or f"\\u{ord(m[0]):04x}", value) + '"'
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list | tuple):
        return "[]"
    raise ValueError(f"{value!r} cannot be written as YAML")


def _read(text: str) -> str | int | float | bool | None:
    try:
        return resolve(text)
    except ValueError:
        return None
