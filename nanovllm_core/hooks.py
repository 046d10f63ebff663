"""All use of pluggy: check a component against its spec, and call its hooks through typed relays.

pluggy keeps one namespace of hooks a manager and drops what it does not know, so every kind gets a small manager of its
own and every class is checked before: a hook that is missing, misspelt, unmarked or cannot be called is an error here,
not a silence later.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import attrs
import pluggy

from nanovllm_core.errors import BrokenComponent, listed, nearest
from nanovllm_core.hookspecs import LEVELS, PROJECT, SPECS

Spec = TypeVar("Spec")
OPTIONAL = frozenset({"callbacks"})  # kinds whose hooks may be left out, all but one


def _hooks(spec: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(member)
        for name, member in vars(spec).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def verify(kind: str, cls: object) -> str | None:
    """What is wrong with a component class of this kind, in one sentence; None when it follows its spec."""
    if not isinstance(cls, type):
        return f"is {type(cls).__name__}, not a class"
    if not attrs.has(cls):
        return "is not an attrs class (decorate it with @frozen(kw_only=True, eq=False))"
    return verify_hooks(kind, cls)


def verify_hooks(kind: str, cls: Any) -> str | None:
    """As `verify`, for the class of a ready instance: it has no options to structure, so it need not be an attrs class."""
    if cls.__eq__ is not object.__eq__:
        return "compares by value, which breaks pluggy (define no __eq__; in attrs and dataclasses: eq=False)"
    if problem := _level(kind, getattr(cls, "nanovllm_api", 1)):
        return problem
    spec = SPECS[kind]
    expected = _hooks(spec)
    marked = {name for name in dir(cls) if callable(m := getattr(cls, name, None)) and hasattr(m, f"{PROJECT}_impl")}
    for name in sorted(marked - set(expected)):
        return f"has a hook {name!r} that {kind} do not have{nearest(name, expected)} (hooks: {listed(expected)})"
    for name in expected:
        if name not in marked and callable(getattr(cls, name, None)):
            return f"defines {name!r} without @hookimpl"
    missing = sorted(set(expected) - marked)
    if missing and (kind not in OPTIONAL or not marked):
        return f"lacks the hook {missing[0]!r}" if marked else f"has no hook (hooks: {listed(expected)})"
    for name in sorted(marked):
        if problem := _uncallable(name, getattr(cls, name), expected[name]):
            return problem
        if kind not in OPTIONAL and inspect.isgeneratorfunction(getattr(cls, name)):
            return f"{name!r} is a generator function: return an iterator instead, e.g. of a second method that yields"
    return None


def _level(kind: str, declared: object) -> str | None:
    here = LEVELS[kind]
    if type(declared) is not int:
        return "declares no number as its API level (write `nanovllm_api: ClassVar[int] = 1`)"
    if declared == here:
        return None
    mend = "a newer nanovllm, or an older version of it" if declared > here else "a newer version of it"
    return f"is written for API level {declared} of {kind}, and this nanovllm has level {here}: install {mend}"


def _uncallable(name: str, function: object, spec: inspect.Signature) -> str | None:
    allowed = [p for p in spec.parameters if p != "self"]
    given = list(inspect.signature(cast("type", function)).parameters.values())
    if not given or given[0].name != "self":
        return f"{name!r} does not take self"
    for p in given[1:]:
        if p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return f"{name!r} takes {p.name!r} in a way that hooks are not called (plain positional arguments only)"
        if p.default is not inspect.Parameter.empty:
            return f"{name!r} gives {p.name!r} a default; hooks have none"
        if p.name not in allowed:
            return f"{name!r} takes {p.name!r}, which its spec does not give{nearest(p.name, allowed)}"
    return None


def bind(spec: type[Spec], components: Iterable[tuple[str, object]]) -> Spec:
    """The hooks of these (label, component) pairs as one relay, called with keywords like the spec's methods.

    First result wins where the spec says so, in the order given. Components must have passed `verify`. A label may
    come again (the same component with other options); an instance may not.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(spec)
    seen: Counter[str] = Counter()
    named: list[tuple[str, object]] = []
    for label, component in components:
        seen[label] += 1
        if any(component is other for _, other in named):
            raise BrokenComponent(f"{label}: the same instance is given twice; make a second one, or name it once")
        named.append((f"{label} #{seen[label]}" if seen[label] > 1 else label, component))
    for name, component in reversed(named):  # pluggy calls the last registered first
        try:
            manager.register(component, name=name)
        except (ValueError, pluggy.PluginValidationError) as e:
            raise BrokenComponent(f"{name}: {e}") from e
    return cast("Spec", manager.hook)


def bound(spec: type[Spec], component: object) -> Spec:
    """The hooks of one component."""
    return bind(spec, [(type(component).__name__, component)])


def given(kind: str, instances: Iterable[object]) -> list[tuple[str, object]]:
    """Ready instances, each with a label for `bind`. Raises BrokenComponent for one whose hooks do not follow the spec."""
    pairs = []
    for i, instance in enumerate(instances):
        label = f"{kind}[{i}] as given: {type(instance).__name__}"
        if isinstance(instance, type):
            raise BrokenComponent(f"{kind}[{i}] as given: {instance.__name__} is a class; give an instance of it")
        if problem := verify_hooks(kind, type(instance)):
            raise BrokenComponent(f"{label} {problem}")
        pairs.append((label, instance))
    return pairs
