"""`--set KEY=VALUE`: one key of a recipe's data changed before it is checked.

KEY is a path with dots, list items by number; VALUE is YAML. Settings apply from left to right, and naming a component
drops the options of the one that it replaces, so `--set model.use=llama --set model.size=tiny` works and the reverse,
which would lose the size, is refused. What is set this way has the setting itself as its place in messages.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from nanovllm_core.contracts import GENERATION, JOINED, OPERATIONS
from nanovllm_core.errors import RecipeError, nearest
from nanovllm_core.yamltext import KeyPath, Place, Text, parse

SETTING = "--set "
COMPONENT, COMPONENT_LIST, KERNELS, TEXT_LIST = "component", "components", "kernels", "texts"
_SLOTS: Mapping[KeyPath, str] = MappingProxyType(
    {
        ("data", "readers"): COMPONENT_LIST,
        ("data", "extractors"): COMPONENT_LIST,
        ("tokenizer",): COMPONENT,
        ("model",): COMPONENT,
        ("kernels",): KERNELS,
        ("parallel",): COMPONENT,
        ("callbacks",): COMPONENT_LIST,
        ("train", "freeze"): TEXT_LIST,
        ("generate", "prompts"): TEXT_LIST,
        ("generate", "stop"): TEXT_LIST,
    }
)


def slot(path: KeyPath) -> str | None:
    """What a path of the recipe holds, where it may be written in more than one way; None for anything else."""
    if path in _SLOTS:
        return _SLOTS[path]
    around = _SLOTS.get(path[:-1])
    return COMPONENT if around in (COMPONENT_LIST, KERNELS) and path[:-1] else None


def override(text: Text, setting: str, recipe: type) -> Text:
    """`text` with one `KEY=VALUE` applied. Raises RecipeError naming the setting.

    `recipe` is the Recipe class: its fields say which keys there are and what a list holds by default.
    """
    place = Place(f"{SETTING}{setting}")
    dotted, equals, value_text = setting.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{place}: expected KEY=VALUE, e.g. --set train.learning_rate=1e-4")
    try:
        given = parse(value_text, "value")
    except RecipeError as e:
        raise RecipeError(f"{place}: {e}; put quotes around a text") from None
    _known(keys, recipe, place)
    data, path = _set(text.data, keys, given.data, (), recipe, place)
    inside = len(path)
    earlier = {at for p, at in text.places.items() if p[:inside] == path and at.file.startswith(SETTING)}
    if lost := sorted(
        str(at) for at in earlier if _key(at) != dotted and _key(at).startswith(".".join(map(str, path)) + ".")
    ):
        raise RecipeError(f"{place}: would drop what {lost[0]} set; give it before that one")
    places = {p: at for p, at in text.places.items() if p[:inside] != path} | {path: place}
    places |= {(*path, *p): place for p in given.places}
    names = {p: at for p, at in text.keys.items() if p[:inside] != path} | {path: place}
    names |= {(*path, *p): place for p in given.keys}
    for end in range(1, inside):  # sections that the text leaves out exist because of this setting
        places.setdefault(path[:end], place)
    return attrs.evolve(text, data=data, places=places, keys=names)


def _key(place: Place) -> str:
    """The key of a setting, by its place."""
    return place.file.removeprefix(SETTING).partition("=")[0]


def _known(keys: list[str], cls: type, place: Place) -> None:
    """Refuse a key that no recipe has, as far as the classes know: options of components are checked by the plan."""
    path: KeyPath = ()
    while attrs.has(cls):
        fields = [a.name for a in attrs.fields(cls) if not a.metadata.get("internal")]
        if keys[0] not in fields:
            where = f"{'.'.join(map(str, path))}: " if path else ""
            allowed = ", ".join(fields)
            raise RecipeError(f"{place}: {where}unknown key {keys[0]!r}{nearest(keys[0], fields)} (allowed: {allowed})")
        path, name = (*path, keys[0]), keys[0]
        keys = keys[1:]
        if not keys or slot(path):
            return
        cls = typing.get_type_hints(cls)[name]


def _set(data: Any, keys: list[str], value: Any, path: KeyPath, recipe: type, place: Place) -> tuple[Any, KeyPath]:
    """`data`, which stands at `path`, with the value at `keys` within it changed; and the path that was set."""
    if not keys:
        return value, path
    kind, here = slot(path), ".".join(map(str, path))
    if data is None:
        data = _default(path, recipe)
    if keys == ["use"] and kind in (COMPONENT, KERNELS):
        return {"use": value}, path
    if kind == COMPONENT:
        if data is None or isinstance(data, str):
            data = {"use": data} if data else {}
    elif kind in (COMPONENT_LIST, TEXT_LIST) and not isinstance(data, list):
        data = [data]
    elif kind == KERNELS:
        if not isinstance(data, dict) or "use" in data:
            data = {"*": data}
        if keys[0] not in (*OPERATIONS, *GENERATION, *JOINED, "*"):
            allowed = ", ".join((*OPERATIONS, *GENERATION, *JOINED, "*"))
            hint = nearest(keys[0], (*OPERATIONS, *GENERATION, *JOINED))
            raise RecipeError(f"{place}: kernels: unknown operation {keys[0]!r}{hint} (allowed: {allowed})")
    elif data is None:
        data = {}
    key = keys[0]
    if isinstance(data, list):
        if not key.isascii() or not key.isdigit() or int(key) > len(data):
            raise RecipeError(f"{place}: {here} is a list of {len(data)}; give a number from 0 to {len(data)}")
        index = int(key)
        inner, at = _set(data[index] if index < len(data) else None, keys[1:], value, (*path, index), recipe, place)
        return [*data[:index], inner, *data[index + 1 :]], at
    if not isinstance(data, dict):
        raise RecipeError(f"{place}: {here} is a single value and holds no {key!r}")
    inner, at = _set(data.get(key), keys[1:], value, (*path, key), recipe, place)
    return {**data, key: inner}, at


def _default(path: KeyPath, recipe: type) -> Any:
    """Default of a list or component that the recipe leaves out, so that a setting can reach into it."""
    if path in ((), ("data",), ("train",), ("generate",)):
        return None
    around: Any = recipe().to_data()
    for part in path:
        if not isinstance(around, dict):
            return None
        around = around.get(part)
    return around
