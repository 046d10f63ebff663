"""`nanovllm schema`: a recipe as JSON Schema (2020-12), for editors that complete and check while one types.

Made of the classes themselves: the sections' and every installed component's options with type, bounds, default and
meaning. A schema says less than a plan: what depends on files, on the machine, on two options together or on a validator
of one's own is for `nanovllm explain`; a broken component is left out. Nothing heavy is imported.
"""

from __future__ import annotations

import json
import math
from collections import Counter, abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import attrs
from attrs import NOTHING

from nanovllm_core.contracts import GENERATION, JOINED, OPERATIONS, ModelRef
from nanovllm_core.errors import BrokenComponent
from nanovllm_core.hookspecs import SPECS
from nanovllm_core.manual import SECTIONS
from nanovllm_core.options import Bounds, OneOf, default_of, describe, is_union, options_of, origin, plain
from nanovllm_core.overrides import COMPONENT, COMPONENT_LIST, KERNELS, slot
from nanovllm_core.recipe import AUTO, Recipe
from nanovllm_core.registry import Registry

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FIXED = ("callbacks",)  # kinds of which nothing is chosen by `auto`
_KINDS = MappingProxyType({"tokenizer": "tokenizers", "model": "models"})  # sections not named as their kind
_TYPES = MappingProxyType(
    {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", Path: "string"}
)
_COMPARISONS = MappingProxyType(  # of attrs' own validators
    {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}
)


def schema(registry: Registry) -> tuple[Schema, list[str]]:
    """The schema of a recipe with these components, and why each of the others is left out."""
    broken: list[str] = []
    kinds = {kind: _kind(registry, kind, broken) for kind in SPECS}
    broken += [entry.fault for entry in registry.entries if entry.kind not in SPECS]
    whole = {"$schema": DIALECT, "title": "A nano-vllm recipe", **_object(Recipe, ())}
    return {**whole, "$defs": kinds}, broken


# ---------------------------------------------------------------- components


def _kind(registry: Registry, kind: str, broken: list[str]) -> Schema:
    """A component of a kind: its bare name, or a mapping with `use`, which decides what else stands in it."""
    bare: list[Schema] = []  # names that stand alone
    uses: list[Schema] = []  # names after `use`
    rules: list[Schema] = []
    offered = Counter(entry.name for entry in registry.of_kind(kind) if not entry.fault)
    if kind not in FIXED:
        auto = {"const": AUTO.use, "description": "The plan chooses, and `nanovllm explain` says why."}
        bare, uses = [auto], [auto]
    for entry in registry.of_kind(kind):
        try:
            loaded = registry.load(entry)
            cls = loaded if isinstance(loaded, type) else None
            options = _object(cls, None) if cls else _object_of({})
            summary = registry.summary(entry)
        except BrokenComponent as e:
            broken.append(str(e))
            continue
        names = [entry.full_name] if offered[entry.name] > 1 else [entry.name, entry.full_name]
        told = [{"const": name, "description": summary} for name in names]
        uses += told
        if not options.get("required"):
            bare += told
        rules.append(_rule(names, options))
    name = {"type": "string", "anyOf": bare} if bare else False
    mapping = {
        "type": "object",
        "properties": {
            "use": {"type": "string", "anyOf": uses or [{"not": {}}], "description": "The component's name."}
        },
        "required": ["use"],
        "allOf": rules,
    }
    return {"anyOf": [name, mapping]}


def _rule(names: list[str], options: Schema) -> Schema:
    named = {"properties": {"use": {"enum": names}}, "required": ["use"]}
    return {"if": named, "then": {**options, "properties": {"use": True, **options["properties"]}}}


def _slot(kind: str, form: str) -> Schema:
    one = {"$ref": f"#/$defs/{kind}"}
    if form == COMPONENT:
        return one
    if form == COMPONENT_LIST:
        return {"anyOf": [one, {"type": "array", "items": one}]}
    if form == KERNELS:
        operations = dict.fromkeys((*OPERATIONS, *GENERATION, *JOINED, "*"), one)
        return {"anyOf": [one, {**_object_of(operations), "not": {"required": ["use"]}}]}
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


# ---------------------------------------------------------------- options


def _object_of(properties: Mapping[str, Any]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _object(cls: type, path: tuple[str, ...] | None) -> Schema:
    """A class with options; `path` is where it stands in a recipe, None within a component."""
    made = _object_of({})
    docs = {option.name: option.doc for option in describe(cls)}
    for a, kind in options_of(cls):
        name = a.alias or a.name
        form = slot((*path, name)) if path is not None else None
        if form is not None:
            option = _slot(_KINDS.get(name, name), form)
            if a.default is None:
                option = {"anyOf": [option, {"type": "null"}]}
        elif path == () and name in SECTIONS:
            option = _object(SECTIONS[name], (name,))
        else:
            option = _bounded(_type(kind), a.validator)
        if docs.get(name):
            option["description"] = docs[name]
        option |= _default(cls, a)
        made["properties"][name] = option
        if a.default is NOTHING:
            made.setdefault("required", []).append(name)
    return made


def _default(cls: type, a: attrs.Attribute[Any]) -> Schema:
    """The default, where it is plain data."""
    value = default_of(cls, a)
    if hasattr(value, "use"):
        return {"default": value.use}
    if value is NOTHING or attrs.has(type(value)):
        return {}
    if isinstance(value, tuple) and value and all(hasattr(item, "use") for item in value):
        return {"default": [item.use for item in value]}
    try:
        return {"default": json.loads(json.dumps(plain(value), allow_nan=False))}
    except (TypeError, ValueError):
        return {}


def _type(tp: Any) -> Schema:
    args = get_args(tp)
    if tp is ModelRef:
        return {"type": "string"}
    if get_origin(tp) is Literal:
        return {"enum": list(args)}
    if is_union(tp):
        arms = [_type(arm) for arm in args if arm is not int or float not in args]
        return {"anyOf": arms}
    if origin(tp) in (list, tuple, abc.Sequence):
        if origin(tp) is tuple and args and args[-1] is not Ellipsis:
            return {"type": "array", "prefixItems": [_type(arm) for arm in args], "items": False, "minItems": len(args)}
        return {"type": "array", "items": _type(args[0]) if args else True}
    if origin(tp) in (dict, abc.Mapping):
        return {"type": "object", "additionalProperties": _type(args[1]) if len(args) == 2 else True}
    if isinstance(tp, type) and attrs.has(tp):
        return _object(tp, None)
    return {"type": _TYPES[tp]} if tp in _TYPES else {}


def _bounded(option: Schema, validator: Any) -> Schema:
    """The option with what its validators say; None passes those that an option which may be null has."""
    for one in _each(validator):
        if isinstance(one, Bounds):
            for limit, exclusive, word in ((one.low, one.open_low, "Minimum"), (one.high, one.open_high, "Maximum")):
                if limit is not None and math.isfinite(limit):
                    option[f"exclusive{word}" if exclusive else word.lower()] = limit
        elif isinstance(one, OneOf):
            null = [None] if {"type": "null"} in option.get("anyOf", ()) else []
            option["enum"] = [*one.allowed, *null]
        elif comparison := _COMPARISONS.get(str(getattr(one, "compare_op", ""))):
            option[comparison] = one.bound
    return option


def _each(validator: Any) -> Iterator[Any]:
    """A validator, or all that attrs' `and_` and `optional` hold."""
    inner = getattr(validator, "_validators", None) or getattr(validator, "validator", None)
    if inner is None:
        yield validator
    else:
        for one in inner if isinstance(inner, tuple | list) else (inner,):
            yield from _each(one)
