"""What an attrs class says about its options: bounds that check themselves, types and meanings in words.

Components import their validators from here: nothing heavier than attrs comes along.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
from attrs import NOTHING, frozen

from nanovllm_core.contracts import ModelRef
from nanovllm_core.errors import BrokenComponent, nearest, reason

INTERNAL = MappingProxyType({"internal": True})
"""Metadata of a field that is no option: it can neither be written in a recipe nor is it shown."""

_NAMES = MappingProxyType(
    {bool: "true or false", int: "integer", float: "number", str: "string", type(None): "null", Path: "path"}
    | {list: "list", tuple: "list", dict: "mapping", object: "anything"}
)


# ---------------------------------------------------------------- validators


@frozen
class Bounds:
    """An attrs validator: a number within bounds. None passes, for options that may be null."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        if self.low is not None and self.high is not None and not self.open_low and not self.open_high:
            return f"between {self.low} and {self.high}"
        low = "" if self.low is None else f"{'above' if self.open_low else 'at least'} {self.low}"
        high = "" if self.high is None else f"{'below' if self.open_high else 'at most'} {self.high}"
        return " and ".join(part for part in (low, high) if part)

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            error: Exception = TypeError(f"got {shown(value)}, expected a number {self}")
        else:
            above = self.low is None or (value > self.low if self.open_low else value >= self.low)
            below = self.high is None or (value < self.high if self.open_high else value <= self.high)
            if above and below:
                return
            error = ValueError(f"got {value}, {self}")
        error.add_note(f"{type(instance).__name__}.{attribute.name}")
        raise error


def at_least(low: float) -> Bounds:
    """Validator: value >= low."""
    return Bounds(low=low)


def at_most(high: float) -> Bounds:
    """Validator: value <= high."""
    return Bounds(high=high)


def between(low: float, high: float) -> Bounds:
    """Validator: low <= value <= high."""
    return Bounds(low=low, high=high)


def above(low: float) -> Bounds:
    """Validator: value > low."""
    return Bounds(low=low, open_low=True)


def below(high: float) -> Bounds:
    """Validator: value < high."""
    return Bounds(high=high, open_high=True)


@frozen
class OneOf:
    """An attrs validator: one of a few values. None passes, for options that may be null."""

    allowed: tuple[Any, ...]

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None and not any(type(value) is type(a) and value == a for a in self.allowed):
            error = ValueError(not_one_of(value, self.allowed))
            error.add_note(f"{type(instance).__name__}.{attribute.name}")
            raise error


def one_of(*allowed: Any) -> OneOf:
    """Validator: value is one of these."""
    return OneOf(allowed)


def not_one_of(value: Any, allowed: Sequence[Any]) -> str:
    """What to say of a value that is none of those allowed."""
    hint = nearest(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
    return f"got {shown(value)}{hint} (allowed: {', '.join(shown(a) for a in allowed)})"


# ---------------------------------------------------------------- types and meanings in words


def is_union(tp: Any) -> bool:
    return get_origin(tp) in (Union, types.UnionType)


def origin(tp: Any) -> Any:
    return get_origin(tp) or tp


def options_of(cls: type) -> Iterator[tuple[attrs.Attribute[Any], Any]]:
    """Fields that a recipe may set, with their resolved types."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as e:
        raise BrokenComponent(
            f"{cls.__module__}:{cls.__qualname__}: the types of its options cannot be resolved ({reason(e)}); "
            "import them outside TYPE_CHECKING"
        ) from e
    for a in attrs.fields(cls):
        if a.init and not a.metadata.get("internal"):
            yield a, hints.get(a.name, Any)


def default_of(cls: type, a: attrs.Attribute[Any]) -> Any:
    """An option's default; NOTHING where there is none, or where it depends on the others."""
    default: Any = a.default
    if not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default
    try:
        return NOTHING if default.takes_self else default.factory()
    except Exception as e:  # a stranger's factory may raise anything
        raise BrokenComponent(
            f"{cls.__module__}:{cls.__qualname__}: the default of its option {a.name!r} fails ({reason(e)})"
        ) from e


def model_refs(component: object) -> Iterator[tuple[str, str]]:
    """The options of a component that name a model, with their values."""
    if attrs.has(type(component)):
        for a, kind in options_of(type(component)):
            value = getattr(component, a.name)
            if value is not None and (kind is ModelRef or (is_union(kind) and ModelRef in get_args(kind))):
                yield a.name, value


def public(component: object) -> dict[str, Any]:
    """A component's options as plain data to be written down: what its name calls a secret becomes `***`."""
    if not attrs.has(type(component)):
        return {}
    return {a.name: without_secrets(plain(getattr(component, a.name)), a.name) for a, _ in options_of(type(component))}


SECRET = re.compile(
    r"token|(.*_)?(api_?key|secret|password|passwd|credentials?|access_?key|(access|api|auth|bearer|hf|hub|refresh)_?token)",
    re.IGNORECASE,
)
"""Names of options that are written as `***` and count for nothing; `eos_token` and the like are a tokenizer's, and do."""


def without_secrets(value: Any, key: str = "") -> Any:
    """Plain data with `***` for each text whose key is a word for a secret."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [without_secrets(v, key) for v in value]
    return "***" if isinstance(value, str) and SECRET.fullmatch(key) else value


def plain(value: Any) -> Any:
    """JSON data; what has none becomes its type's name, which unlike a representation is the same in every process."""
    if isinstance(value, Path):
        return str(value)
    if attrs.has(type(value)):
        return {a.name: plain(getattr(value, a.name)) for a in attrs.fields(type(value)) if a.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def type_text(tp: Any) -> str:
    """A type in the words of a recipe: `integer`, `list of string`, `'a' | 'b'`, `number or null`."""
    if tp is ModelRef:
        return "model folder or hub name"
    if get_origin(tp) is Literal:
        return " | ".join(shown(a) for a in get_args(tp))
    if is_union(tp):
        arms = [arm for arm in get_args(tp) if arm is not int or float not in get_args(tp)]
        return " or ".join(dict.fromkeys(type_text(arm) for arm in arms))
    args = [a for a in get_args(tp) if a is not Ellipsis]
    if origin(tp) in (list, tuple, abc.Sequence):
        return f"list of {' and '.join(dict.fromkeys(type_text(a) for a in args))}" if args else "list"
    if origin(tp) in (dict, abc.Mapping):
        return f"mapping of {type_text(args[1])}" if len(args) == 2 and args[1] is not Any else "mapping"
    if isinstance(tp, type) and attrs.has(tp):
        return "component" if "use" in attrs.fields_dict(tp) else "mapping"
    return "anything" if tp is Any else _NAMES.get(tp) or str(getattr(tp, "__name__", tp))


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@frozen
class Option:
    """One option of a class, in words."""

    name: str
    type: str
    default: str  # "required" when there is none
    doc: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.name, self.type, self.default, self.doc))


def describe(cls: type) -> list[Option]:
    """The options of a class, with the meanings that its docstring gives in lines of the form `name: meaning`."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        name = ""
        for text in inspect.cleandoc(base.__doc__ or "").splitlines():
            if found := re.match(r"(\w+): +(\S.*)", text):
                name = found[1]
                docs[name] = found[2]
            elif name and text.startswith(" ") and text.strip():
                docs[name] += " " + text.strip()
            else:
                name = ""
    return [
        Option(a.alias or a.name, type_text(kind), _default_text(cls, a), docs.get(a.name, ""))
        for a, kind in options_of(cls)
    ]


def _default_text(cls: type, a: attrs.Attribute[Any]) -> str:
    default = default_of(cls, a)
    if default is NOTHING:
        return "required" if a.default is NOTHING else "computed"
    if isinstance(default, tuple) and default and all(hasattr(item, "use") for item in default):
        return ", ".join(item.use for item in default)  # components by name
    if attrs.has(type(default)):
        return "its own defaults"
    try:
        return json.dumps(default, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(default)
