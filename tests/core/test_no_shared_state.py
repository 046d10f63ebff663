"""Nothing is shared between two users of the core in one process: no module holds what can change, and registries stand alone."""

import ast
import importlib
import inspect
import pkgutil
import re
import types
import typing
from datetime import timedelta
from enum import Enum
from pathlib import Path

import attrs
import pluggy
import pytest
from attrs import frozen

import nanovllm_core
from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan
from nanovllm_core.contracts import Accept, Record, Refuse
from nanovllm_core.errors import BrokenComponent, UnknownComponent

MODULES = ["nanovllm_core", *(m.name for m in pkgutil.walk_packages(nanovllm_core.__path__, "nanovllm_core."))]
CONSTANT = (bool, int, float, complex, str, bytes, type(None), re.Pattern, Enum, Path, range, timedelta)
DECLARED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, typing.TypeVar, typing.NewType)
MARKERS = (pluggy.HookspecMarker, pluggy.HookimplMarker)  # hold a project's name, in slots
ALLOWED = {
    "nanovllm_core.data.building.DOCUMENT": "a numpy dtype, of which nothing can be set",
    "nanovllm_core.data.store.DOCUMENT": "the same",
    "nanovllm_core.data.sources.ROW": "a struct.Struct, of which nothing can be set",
    "nanovllm_core.testing.extractors.ANYTHING": "records of every JSON type, handed to extractors as copies",
    "nanovllm_core.training.launched._telling": "why this process ends, which it does once",
    "nanovllm_core.literals.literal": "tables of installed packages, the same whenever they are read",
    "nanovllm_core.server.parameters.NEUTRAL": "values to compare a request's with, handed to nobody",
}  # name: why it may stand


def changeable(value):
    """Why this value can differ from one look to the next; None when it cannot."""
    if hasattr(value, "cache_info"):
        return "a cache"
    if value is attrs.frozen:  # functools.partial
        return None
    if isinstance(value, (*CONSTANT, *DECLARED, *MARKERS)) or type(value).__module__ in (
        "typing",
        "types",
        "__future__",
    ):
        return None
    if isinstance(value, tuple | frozenset):
        return next((why for item in value if (why := changeable(item))), None)
    if isinstance(value, types.MappingProxyType):
        return next((why for item in value.values() if (why := changeable(item))), None)
    if isinstance(value, types.GenericAlias | types.UnionType):
        return None
    if attrs.has(type(value)):
        if type(value).__setattr__ is object.__setattr__:
            return f"an instance of {type(value).__name__}, which is not frozen"
        return next((why for a in attrs.fields(type(value)) if (why := changeable(getattr(value, a.name)))), None)
    return f"a {type(value).__name__}"


def found(module):
    """`name: why` of everything in a module, and in the classes that it defines, that can change."""
    for name, value in vars(module).items():
        elsewhere = isinstance(value, type | types.FunctionType) and value.__module__ != module.__name__
        if name.startswith("__") or elsewhere:
            continue
        if why := changeable(value):
            yield f"{name}: {why}"
        if isinstance(value, type):
            for inner, member in vars(value).items():
                if isinstance(member, list | dict | set | bytearray) and not inner.startswith("__"):
                    yield f"{name}.{inner}: a {type(member).__name__}"
                if hasattr(member, "cache_info"):
                    yield f"{name}.{inner}: a cache"
        if isinstance(value, type) and attrs.has(value):
            for a in attrs.fields(value):  # a default is shared by all instances; a factory's value is not
                given = a.default is not attrs.NOTHING and not isinstance(a.default, attrs.Factory)
                if given and (why := changeable(a.default)):
                    yield f"{name}.{a.name}: by default {why}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_holds_what_can_change(name):
    module = importlib.import_module(name)
    left = [text for text in found(module) if f"{name}.{text.partition(':')[0]}" not in ALLOWED]
    assert left == []
    tree = ast.parse(inspect.getsource(module))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)] == []


def test_the_walk_finds_what_it_looks_for():
    module = types.ModuleType("m")
    code = """
import functools, types
from attrs import define, frozen
A, B, C, D = [], {}, (1, []), types.MappingProxyType({"a": set()})
@define
class Open: ...
@frozen
class Shut:
    x: object = ()
E, F, OK = Open(), Shut(x={}), (Shut(), types.MappingProxyType({"a": (1, "b")}), frozenset({1}))
@functools.lru_cache
def g(): ...
class Holds:
    items = []
@frozen
class Defaults:
    x: object = (Shut(x=[]),)
    y: tuple = (Shut(),)
"""
    exec(code, module.__dict__)
    assert {text.partition(":")[0] for text in found(module)} == {
        "A",
        "B",
        "C",
        "D",
        "E",
        "F",
        "g",
        "Holds.items",
        "Defaults.x",
    }


def reader(word):
    @frozen(kw_only=True, eq=False)
    class Reads:
        """From memory."""

        @hookimpl
        def probe(self, source):
            return Accept() if source.path == "memory:" else Refuse("not mine")

        @hookimpl
        def read(self, source):
            return iter([Record(value=word, source="memory")])

    return Reads


def test_two_registries_share_nothing(tmp_path):
    installed = Registry.from_environment()
    before = installed.entries
    one, two = (installed.extended(readers={"memory": reader(word)}) for word in ("one", "two"))
    three = installed.extended(readers={"memory": object})
    recipe = Recipe.from_data({"data": {"path": "memory:"}, "model": "preset"}, base=tmp_path)
    plans = [make_plan(recipe, registry, Machine()) for registry in (one, two)]
    walks = [iter(plan.data.documents) for plan in plans]
    assert [next(walk).text for walk in reversed(walks)] == ["two", "one"]
    assert plans[0].model.model.component is not plans[1].model.model.component
    with pytest.raises(BrokenComponent):
        three.load(three.find("readers", "memory"))
    assert one.load(one.find("readers", "memory")) is not two.load(two.find("readers", "memory"))
    with pytest.raises(UnknownComponent):
        installed.find("readers", "memory")
    assert installed.entries is before
    assert "memory" not in {e.name for e in Registry.from_environment().entries}
