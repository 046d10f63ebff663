"""What a person may write, taken from the classes themselves: the keys of a recipe, the options of a component."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import MappingProxyType

from nanovllm_core.options import Option, describe
from nanovllm_core.recipe import Data, Generate, Recipe, Train
from nanovllm_core.registry import Registry

SECTIONS = MappingProxyType({"data": Data, "train": Train, "generate": Generate})


def keys_help() -> str:
    """Every key of a recipe with type, default and meaning."""
    lines = [
        "keys of a recipe (a part is `{use: NAME, ...its options}` or just its name; `nanovllm plugins KIND:NAME` shows",
        "a part's options):",
    ]
    for option in describe(Recipe):
        lines.append(f"  {option.name}: {option.doc}")
        if option.name in SECTIONS:
            lines += _table(describe(SECTIONS[option.name]), indent=4)
    return "\n".join(lines) + "\n"


def describe_component(registry: Registry, label: str) -> str:
    """One component (`KIND:NAME`): where it comes from, what it does, its options."""
    entry = registry.labelled(label)
    loaded = registry.load(entry)
    cls = loaded if isinstance(loaded, type) else type(loaded)
    options = describe(cls)
    names = {option.name for option in options}
    prose, told = [], False  # an option's meaning, and the indented lines that go on with it, stand in the table
    for text in inspect.cleandoc(cls.__doc__ or "").splitlines():
        told = text.partition(":")[0] in names or (told and text.startswith(" "))
        prose += [] if told else [text]
    head = f"{entry.label} from {entry.distribution} {entry.version}".rstrip()
    table = list(_table(options, indent=2)) or ["  none"]
    return "\n".join([head, "", "\n".join(prose).strip(), "", "options:", *table]) + "\n"


def _table(options: Iterable[Option], indent: int) -> Iterator[str]:
    for option in options:
        default = "required" if option.default == "required" else f"default {option.default}"
        yield f"{' ' * indent}{option.name}: {option.doc} [{option.type}, {default}]"
