"""Plain data to attrs classes, strictly: exact types, no unknown key, every problem at once, each with its place.

cattrs dispatches on types; its own hooks coerce (`bool("no")` is True) and drop the text of validators, so each hook
here is stricter. A nest of hooks raises one `_Problems` that gathers all problems below it by relative path, and
`structure` makes lines of them such as `recipe.yaml:3:29: data.readers[0].level: got 7, at most 5`.
"""

from __future__ import annotations

import inspect
import math
from collections import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import attrs
from attrs import NOTHING

from nanovllm_core.contracts import ModelRef
from nanovllm_core.errors import NanoError, RecipeError, nearest
from nanovllm_core.files import located
from nanovllm_core.options import (
    INTERNAL,
    Option,
    above,
    at_least,
    at_most,
    below,
    between,
    default_of,
    describe,
    is_union,
    not_one_of,
    options_of,
    origin,
    shown,
    type_text,
)
from nanovllm_core.yamltext import KeyPath, Text

if TYPE_CHECKING:
    from cattrs import Converter

__all__ = [
    "INTERNAL",
    "Option",
    "above",
    "at_least",
    "at_most",
    "below",
    "between",
    "describe",
    "line",
    "path_text",
    "structure",
]

T = TypeVar("T")


def structure(
    data: Any,
    cls: type[T],
    *,
    path: KeyPath = (),
    places: Text | None = None,
    base: Path | None = None,
    error: type[NanoError] = RecipeError,
) -> T:
    """`data` as an instance of `cls`.

    `path` is where the data stands in `places`; folders named by ModelRef and Path options count from `base`. Raises
    `error` with one line for each problem found, or BrokenComponent when the options' types cannot be resolved.
    """
    try:
        result: T = _converter(base).structure(data, cls)
    except _Problems as problems:
        lines = [line(text, (*path, *at), places, key=key) for at, text, key in problems.items]
        raise error("\n".join(lines)) from None
    return result


def line(text: str, path: KeyPath, places: Text | None, *, key: bool = False) -> str:
    """One problem: its place where known, its path, the text. `key`: the place of the key, not of the value."""
    place = None if places is None else places.key_place(path) if key else places.place(path)
    shown = path[:-1] if key else path
    return ": ".join(str(part) for part in (place, path_text(shown), text) if part)


def path_text(path: KeyPath) -> str:
    """`("data", "readers", 0, "level")` as `data.readers[0].level`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


class _Problems(Exception):
    def __init__(self, items: list[tuple[KeyPath, str, bool]], mismatch: bool = False) -> None:
        super().__init__(items)
        self.items = items  # relative path, text, whether it is about the key
        self.mismatch = mismatch  # the value is of another kind altogether: another type may fit


def _problem(text: str) -> _Problems:
    return _Problems([((), " ".join(text.split()), False)])


def _mismatch(value: Any, tp: Any) -> _Problems:
    return _Problems([((), f"got {shown(value)}, expected {type_text(tp)}", False)], mismatch=True)


class _Gather:
    """Structures one part after another and keeps what is wrong in each."""

    def __init__(self) -> None:
        self.items: list[tuple[KeyPath, str, bool]] = []

    def step(self, part: str | int, c: Converter, value: Any, tp: Any) -> Any:
        try:
            return c.structure(value, tp)
        except _Problems as problems:
            self.items += [((part, *at), text, key) for at, text, key in problems.items]
            return NOTHING

    def done(self) -> None:
        if self.items:
            raise _Problems(self.items)


def _converter(base: Path | None) -> Converter:
    from cattrs import Converter

    c = Converter(detailed_validation=False)
    hooks: list[tuple[Callable[[Any], bool], Callable[[Any, Any], Any]]] = [
        (lambda tp: tp is Any or tp is object, lambda value, tp: value),
        (lambda tp: get_origin(tp) is Literal, _literal),
        (lambda tp: tp is None or tp is type(None), lambda value, tp: _exact(value, type(None))),
        (is_union, lambda value, tp: _union(c, value, tp)),
        (lambda tp: origin(tp) in (list, tuple, abc.Sequence), lambda value, tp: _sequence(c, value, tp)),
        (lambda tp: origin(tp) in (dict, abc.Mapping), lambda value, tp: _mapping(c, value, tp)),
        (lambda tp: isinstance(tp, type) and attrs.has(tp), lambda value, tp: _attrs(c, value, tp)),
        (lambda tp: tp is ModelRef, lambda value, tp: _model_ref(_exact(value, str), base)),
    ]
    for applies, hook in hooks:
        c.register_structure_hook_func(applies, hook)
    for scalar in (bool, int, str):
        c.register_structure_hook(scalar, _exact)
    c.register_structure_hook(float, lambda value, tp: _number(value))
    c.register_structure_hook(Path, lambda value, tp: _path(_exact(value, str), base))
    return c


def _exact(value: Any, tp: Any) -> Any:
    if type(value) is not tp:
        raise _mismatch(value, tp)
    return value


def _number(value: Any) -> float:
    if type(value) is not int and type(value) is not float:
        raise _mismatch(value, float)
    try:
        number = float(value)
    except OverflowError:
        raise _problem("this number is too large") from None
    if not math.isfinite(number):
        raise _problem(f"got {number}, expected a finite number")
    return number


def _literal(value: Any, tp: Any) -> Any:
    allowed = get_args(tp)
    if any(type(value) is type(a) and value == a for a in allowed):
        return value
    raise _problem(not_one_of(value, allowed))


def _union(c: Converter, value: Any, tp: Any) -> Any:
    arms = [arm for arm in get_args(tp) if arm is not type(None)]
    if value is None and len(arms) < len(get_args(tp)):
        return None
    deeper: _Problems | None = None
    for arm in arms:
        try:
            return c.structure(value, arm)
        except _Problems as problems:
            if not problems.mismatch and (len(arms) == 1 or get_origin(arm) is not Literal):
                deeper = problems
    raise deeper or _mismatch(value, tp)


def _sequence(c: Converter, value: Any, tp: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _mismatch(value, tp)
    kind, args = origin(tp), get_args(tp)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _problem(f"got {len(value)} items, expected {len(args)}")
        kinds = list(args)
    else:
        kinds = [args[0] if args else Any] * len(value)
    gather = _Gather()
    items = [gather.step(i, c, v, k) for i, (v, k) in enumerate(zip(value, kinds, strict=True))]
    gather.done()
    return items if kind is list else tuple(items)


def _mapping(c: Converter, value: Any, tp: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(value, tp)
    kind = (get_args(tp) or (str, Any))[1]
    gather = _Gather()
    items = {key: gather.step(key, c, v, kind) for key, v in value.items()}
    gather.done()
    return items


def _attrs(c: Converter, value: Any, cls: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _mismatch(value, cls)
    options = {a.alias or a.name: (a, kind) for a, kind in options_of(cls)}
    gather = _Gather()
    for key in value:
        if key not in options:
            known = ", ".join(options) or "none"
            gather.items.append(((key,), f"unknown key {key!r}{nearest(str(key), options)} (allowed: {known})", True))
    given: dict[str, Any] = {}
    for name, (a, kind) in options.items():
        if name in value:
            found = gather.step(name, c, value[name], kind)
            if found is not NOTHING:
                given[name] = found
        elif a.default is NOTHING:
            gather.items.append(((), f"{name!r} is missing ({type_text(kind)})", False))
    if not gather.items:
        try:
            return cls(**given)
        except Exception as e:  # below, each validator is asked alone
            whole: Exception | None = e
    else:
        whole = None
    _validate(cls, given, set(value), gather)
    if whole is not None and not gather.items:
        raise _problem(_said(whole)) from whole
    raise _Problems(gather.items)


def _validate(cls: Any, given: Mapping[str, Any], written: set[str], gather: _Gather) -> None:
    """Ask each validator about what could be structured; `draft` stands in for the instance they may look at."""
    draft = cls.__new__(cls)
    for a in attrs.fields(cls):
        name = a.alias or a.name
        value = given.get(name, NOTHING if name in written else default_of(cls, a))
        if value is not NOTHING:
            object.__setattr__(draft, a.name, a.converter(value) if inspect.isfunction(a.converter) else value)
    complete = not gather.items
    for a in attrs.fields(cls):
        if a.validator is None or (a.alias or a.name) not in given or not hasattr(draft, a.name):
            continue
        try:
            a.validator(draft, a, getattr(draft, a.name))
        except Exception as e:
            if complete or isinstance(e, ValueError | TypeError):  # else it looked at an option that is wrong itself
                gather.items.append(((a.alias or a.name,), " ".join(_said(e).split()), False))


def _said(e: Exception) -> str:
    first = e.args[0] if e.args and isinstance(e.args[0], str) else ""
    return first if isinstance(e, ValueError | TypeError | NanoError) and first else f"{type(e).__name__}: {e}"


def _path(value: str, base: Path | None) -> Path:
    try:
        return located(base or Path(), value)
    except ValueError as e:
        raise _problem(str(e)) from None


def _model_ref(value: str, base: Path | None) -> ModelRef:
    folder = _path(value, base)
    here = folder.is_dir() or (folder.suffix.lower() == ".gguf" and folder.is_file())
    return ModelRef(str(folder.resolve()) if value and here else value)
