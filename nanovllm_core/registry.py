"""Which components are installed, found through entry points and loaded one by one.

Finding reads only the metadata of distributions; a component's module is imported when it is named, or when a slot says
`auto` and its kind is asked. Nothing is global: every registry stands alone.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import evolve, field, frozen

from nanovllm_core.errors import AmbiguousComponent, BrokenComponent, ComponentError, UnknownComponent, listed, nearest
from nanovllm_core.hooks import verify
from nanovllm_core.hookspecs import SPECS

GROUP = "nanovllm."


@frozen(kw_only=True, eq=False)
class Entry:
    """One component as its distribution announces it."""

    kind: str
    name: str
    distribution: str = ""
    version: str = ""
    source: Any = field(repr=False)  # an EntryPoint, a class, or a ready instance

    @property
    def full_name(self) -> str:
        """`distribution/name`, which is never ambiguous."""
        return f"{self.distribution}/{self.name}"

    @property
    def label(self) -> str:
        """`kind:name`, for messages."""
        return f"{self.kind}:{self.name}"


@frozen(kw_only=True)
class Row:
    """A line of `nanovllm plugins`."""

    kind: str
    name: str
    distribution: str
    version: str
    state: str  # "ok" | "collision" | "broken"
    summary: str  # of the component, or the reason why it cannot be used


@frozen
class Registry:
    """The components of one run or tool. Make one with `from_environment` or `of`."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def from_environment(cls, without: Sequence[str] = ()) -> Registry:
        """All installed components, less `without` (`kind:name` or `kind:distribution/name`), which is never imported."""
        found: list[Entry] = []
        seen: set[str] = set()
        for dist in importlib.metadata.distributions():
            if GROUP not in (dist.read_text("entry_points.txt") or "") or dist.name in seen:
                continue  # parsing the metadata of every installed distribution would take most of the time
            seen.add(dist.name)
            for point in dist.entry_points:
                kind = point.group.removeprefix(GROUP)
                if point.group.startswith(GROUP) and kind in SPECS:
                    found.append(
                        Entry(kind=kind, name=point.name, distribution=dist.name, version=dist.version, source=point)
                    )
        order = {kind: i for i, kind in enumerate(SPECS)}
        found.sort(key=lambda e: (order[e.kind], e.name, e.distribution))
        return cls(tuple(found)).without(without)

    @classmethod
    def of(cls, **kinds: Mapping[str, Any]) -> Registry:
        """A registry of just these: `Registry.of(readers={"memory": MyReader})` (classes or ready instances)."""
        return cls().extended(**kinds)

    def extended(self, **kinds: Mapping[str, Any]) -> Registry:
        """This registry and more, given as to `of`. A name given here hides an installed one."""
        added = []
        for kind, components in kinds.items():
            if kind not in SPECS:
                raise UnknownComponent(
                    f"{kind!r} is no kind of component{nearest(kind, SPECS)} (kinds: {listed(SPECS)})"
                )
            for name, source in components.items():
                added.append(Entry(kind=kind, name=name, distribution="(given)", source=source))
        hidden = {(e.kind, e.name) for e in added}
        return evolve(self, entries=(*(e for e in self.entries if (e.kind, e.name) not in hidden), *added))

    def without(self, names: Iterable[str]) -> Registry:
        """This registry less the components named `kind:name` or `kind:distribution/name`."""
        kept = self.entries
        for given in names:
            kind, colon, name = given.partition(":")
            if not colon or kind not in SPECS:
                raise ComponentError(
                    f"--without {given}: give KIND:NAME, e.g. kernels:torch{nearest(kind, SPECS)} (kinds: {listed(SPECS)})"
                )
            rest = tuple(e for e in kept if e.kind != kind or name not in (e.name, e.full_name))
            if len(rest) == len(kept):
                self.find(kind, name)  # raises for what never was there
            kept = rest
        return evolve(self, entries=kept)

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        """All entries of a kind, by name."""
        return tuple(e for e in self.entries if e.kind == kind)

    def find(self, kind: str, name: str) -> Entry:
        """The one entry with this bare or full name. Raises UnknownComponent or AmbiguousComponent."""
        matches = [e for e in self.of_kind(kind) if name in (e.name, e.full_name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(e.full_name for e in matches)
            raise AmbiguousComponent(f"{kind}: {name!r} is offered by several distributions; write one of {names}")
        known = {e.name for e in self.of_kind(kind)}
        raise UnknownComponent(
            f"{kind}: nothing installed is named {name!r}{nearest(name, known)} (installed: {listed(known)})"
        )

    def load(self, entry: Entry) -> Any:
        """The component's class (or the instance that was given). Raises BrokenComponent with the reason."""
        source = entry.source
        if isinstance(source, importlib.metadata.EntryPoint):
            try:
                source = source.load()
            except (Exception, SystemExit) as e:  # a stranger's module may raise anything; its reason is shown
                raise BrokenComponent(f"{self._from(entry)}: does not import: {type(e).__name__}: {e}") from e
        cls = source if isinstance(source, type) else type(source)
        if problem := verify(entry.kind, cls):
            raise BrokenComponent(f"{self._from(entry)}: {cls.__name__} {problem}")
        return source

    @staticmethod
    def _from(entry: Entry) -> str:
        return f"{entry.label} from {entry.distribution} {entry.version}".rstrip()

    def rows(self) -> list[Row]:
        """Every component with its state; imports the (light) classes."""
        rows = []
        for e in self.entries:
            state, summary = "ok", ""
            try:
                loaded = self.load(e)
                summary = summary_of(loaded if isinstance(loaded, type) else type(loaded))
            except BrokenComponent as error:
                state, summary = "broken", str(error)
            same = [o for o in self.entries if (o.kind, o.name) == (e.kind, e.name)]
            if state == "ok" and len(same) > 1:
                others = ", ".join(o.full_name for o in same if o is not e)
                state, summary = "collision", f"write {e.full_name} in a recipe (also offered: {others}); {summary}"
            rows.append(
                Row(
                    kind=e.kind,
                    name=e.name,
                    distribution=e.distribution,
                    version=e.version,
                    state=state,
                    summary=summary,
                )
            )
        return rows


def summary_of(cls: type) -> str:
    """The first line of a component's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]
