"""What the installed distributions announce: their entry points in our groups, with what is wrong with each.

Only metadata is read, and of that just what is needed: `importlib.metadata` parses each distribution's whole METADATA
as an e-mail message, which for 150 distributions takes longer than everything else. One whose metadata cannot be read
is an entry with a fault, never the end of the search.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from typing import Any

from attrs import field, frozen

from nanovllm_core.errors import listed, nearest, reason
from nanovllm_core.hookspecs import SPECS

GROUP = "nanovllm."
RESERVED = ("auto",)  # words that a recipe writes where a component's name stands
_NAME = re.compile(r"\w[\w.+-]*")


@frozen(kw_only=True, eq=False)
class Entry:
    """One component as its distribution announces it."""

    kind: str
    name: str
    distribution: str = ""
    version: str = ""
    source: Any = field(repr=False)  # an EntryPoint, a class, or a ready instance
    fault: str = ""  # why it cannot be loaded, when the announcement itself says so

    @property
    def full_name(self) -> str:
        """`distribution/name`, which is never ambiguous."""
        return f"{self.distribution}/{self.name}"

    @property
    def label(self) -> str:
        """`kind:name`, for messages."""
        return f"{self.kind}:{self.name}"


def installed() -> Iterator[Entry]:
    """Every component that is announced in this environment; of two distributions of one name the first on the path."""
    seen: set[str] = set()
    for dist in distributions():
        if (folder := _folder_name(dist)) in seen:
            continue
        seen.update([folder] if folder else [])
        try:
            text = dist.read_text("entry_points.txt") or ""
            if GROUP not in text:
                continue
            name, version = _name_and_version(dist)
        except (OSError, ValueError) as e:
            where = getattr(dist, "_path", "a distribution")
            yield Entry(kind="", name="", source=None, fault=f"{where}: its metadata cannot be read ({reason(e)})")
            continue
        yield from _entries(text, name, version)


def _folder_name(dist: Distribution) -> str:
    """The distribution's name in normal form (PEP 503) by its metadata folder, cheaper than METADATA; empty if unknown."""
    stem = Path(str(getattr(dist, "_path", ""))).stem  # NAME-VERSION, or NAME
    return re.sub(r"[-_.]+", "-", stem.rpartition("-")[0] or stem).lower()


def name_fault(name: str) -> str:
    """Why a recipe cannot write this name; empty when it can."""
    if not _NAME.fullmatch(name):
        return f"its name {name!r} cannot be written in a recipe; allowed are letters, digits and _ . + -"
    return f"its name {name!r} has a meaning of its own in a recipe" if name in RESERVED else ""


def _name_and_version(dist: Distribution) -> tuple[str, str]:
    found: dict[str, str] = {}
    for line in (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "").splitlines():
        key, _, value = line.partition(":")
        if not line.strip() or len(found) == 2:
            break
        if key in ("Name", "Version"):
            found[key] = value.strip()
    if not found.get("Name"):
        raise ValueError("METADATA has no name")
    return found["Name"], found.get("Version", "")


def _entries(text: str, distribution: str, version: str) -> Iterator[Entry]:
    group, seen = "", set()
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif group.startswith(GROUP) and line and not line.startswith(("#", ";")):
            kind, (name, equals, value) = group.removeprefix(GROUP), map(str.strip, line.partition("="))
            fault = _fault(kind, name, equals, value) or (
                f"its entry_points.txt has the name {name!r} twice" if (kind, name) in seen else ""
            )
            seen.add((kind, name))
            source = EntryPoint(name, value, group)
            yield Entry(kind=kind, name=name, distribution=distribution, version=version, source=source, fault=fault)


def _fault(kind: str, name: str, equals: str, value: str) -> str:
    if kind not in SPECS:
        return f"{GROUP}{kind} is no group of components{nearest(kind, SPECS)} (kinds: {listed(SPECS)})"
    if not equals or not EntryPoint.pattern.match(value):
        return "its line in entry_points.txt is not `name = module:Class`"
    return name_fault(name)
