"""Which components are installed, found through entry points and loaded one by one.

Finding reads only the metadata of distributions; a component's module is imported when it is named, or when a slot says
`auto` and its kind is asked. Nothing is global: every registry stands alone. An import that hangs is given up, where the
system allows it (`timelimit`); what a module prints while it is imported goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from typing import Any

from attrs import evolve, frozen

from nanovllm_core.errors import (
    AmbiguousComponent,
    BrokenComponent,
    ComponentError,
    UnknownComponent,
    listed,
    nearest,
    reason,
)
from nanovllm_core.hooks import verify
from nanovllm_core.hookspecs import SPECS
from nanovllm_core.installed import GROUP, installed, name_fault
from nanovllm_core.installed import Entry as Entry
from nanovllm_core.options import default_of, options_of
from nanovllm_core.timelimit import Expired, time_limit

HEAVY = ("torch", "transformers", "numpy")  # what cannot be imported again when an import of it was cut short


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
    timeout: float = 10.0  # seconds that the import of one component may take

    @classmethod
    def from_environment(cls, without: Sequence[str] = (), timeout: float = 10.0) -> Registry:
        """All installed components, less `without` (`kind:name` or `kind:distribution/name`), which is never imported."""
        order = {kind: i for i, kind in enumerate(SPECS)}
        found = sorted(installed(), key=lambda e: (order.get(e.kind, len(order)), e.kind, e.name, e.distribution))
        return cls(tuple(found), timeout).without(without)

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
                added.append(Entry(kind=kind, name=name, distribution="(given)", source=source, fault=name_fault(name)))
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

    def find(self, kind: str, name: str, home: Sequence[str] = ()) -> Entry:
        """The one entry with this bare or full name; where several have it, that of the first distribution in `home`.

        Raises UnknownComponent or AmbiguousComponent.
        """
        named = [e for e in self.of_kind(kind) if name in (e.name, e.full_name)]
        matches = [e for e in named if not e.fault] or named
        if len(matches) > 1:
            homely = [e for distribution in home for e in matches if e.distribution == distribution]
            matches = homely[:1] or matches
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(e.full_name for e in matches)
            raise AmbiguousComponent(f"{kind} {name!r} is offered by several distributions; write one of {names}")
        known = {e.name for e in self.of_kind(kind)}
        close = nearest(name, {e.full_name for e in self.of_kind(kind)} if "/" in name else known)
        raise UnknownComponent(f"nothing installed in {kind} is named {name!r}{close} (installed: {listed(known)})")

    def labelled(self, label: str) -> Entry:
        """The one entry that `KIND:NAME` says. Raises UnknownComponent or AmbiguousComponent."""
        kind, colon, name = label.partition(":")
        if not colon or kind not in SPECS:
            raise UnknownComponent(f"{label}: give KIND:NAME, e.g. tokenizers:bpe (kinds: {listed(SPECS)})")
        return self.find(kind, name)

    def load(self, entry: Entry) -> Any:
        """The component's class (or the instance that was given). Raises BrokenComponent with the reason."""
        source = entry.source
        try:
            if entry.fault:
                raise BrokenComponent(entry.fault)
            if isinstance(source, EntryPoint):
                source = self._import(source)
            _check(entry.kind, source)
        except BrokenComponent as e:
            made = f" from {entry.distribution} {entry.version}".rstrip() if entry.distribution else ""
            said = ": ".join(part for part in (f"{entry.label}{made}".strip(": "), str(e)) if part)
            raise BrokenComponent(said) from e.__cause__
        return source

    def _import(self, point: EntryPoint) -> Any:
        before = {name for name in HEAVY if name in sys.modules}
        try:
            with redirect_stdout(sys.stderr), time_limit(self.timeout):
                return point.load()
        except Expired:
            if spoilt := [name for name in HEAVY if name in sys.modules and name not in before]:
                raise ComponentError(
                    f"{point.group.removeprefix(GROUP)}:{point.name} ({point.value}): its import did not end within "
                    f"{self.timeout:g} s and was stopped inside {spoilt[0]}, which a process can begin to import only once; "
                    f"leave it out with --without {point.group.removeprefix(GROUP)}:{point.name}"
                ) from None
            raise BrokenComponent(
                f"its import does not end within {self.timeout:g} s (heavy imports belong inside methods)"
            ) from None
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a stranger's module may raise anything, SystemExit too; its reason is shown
            raise BrokenComponent(f"does not import: {reason(e)}") from e

    def rows(self) -> list[Row]:
        """Every component with its state; imports the (light) classes."""
        return [self.row(e) for e in self.entries]

    def summary(self, entry: Entry) -> str:
        """The first line of its docstring; imports its class. Raises BrokenComponent."""
        loaded = self.load(entry)
        text = (loaded if isinstance(loaded, type) else type(loaded)).__doc__
        return text.strip().partition("\n")[0] if isinstance(text, str) else ""

    def row(self, entry: Entry, load: Callable[[], str] | None = None) -> Row:
        """One component with its state; `load` gives its summary or raises BrokenComponent, else it is imported here."""
        state = "ok"
        try:
            summary = load() if load else self.summary(entry)
        except ComponentError as error:
            state, summary = "broken", str(error)
        others = [
            o.full_name for o in self.of_kind(entry.kind) if o.name == entry.name and o is not entry and not o.fault
        ]
        if state == "ok" and others:
            state = "collision"
            summary = f"write {entry.full_name} in a recipe (also offered: {', '.join(others)}); {summary}"
        return Row(
            kind=entry.kind,
            name=entry.name,
            distribution=entry.distribution,
            version=entry.version,
            state=state,
            summary=summary,
        )


def _check(kind: str, source: Any) -> None:
    """Raise BrokenComponent for a class that cannot be what its kind needs, or an instance of one."""
    cls = source if isinstance(source, type) else type(source)
    try:
        if problem := verify(kind, cls):
            raise BrokenComponent(f"{cls.__name__} {problem}")
        if cls is source:
            for a, _ in options_of(cls):
                default_of(cls, a)
    except BrokenComponent:
        raise
    except Exception as e:  # a metaclass can make all of this fail
        raise BrokenComponent(f"its class cannot be looked at ({reason(e)})") from e


def rows_table(rows: Sequence[Row]) -> str:
    """The lines of `nanovllm plugins`, in columns. What a stranger wrote cannot move the cursor."""
    last = [name for name in ("seconds", "summary") if rows and hasattr(rows[0], name)]
    cells = [("KIND", "NAME", "FROM", "STATE", *(name.upper() for name in last))]
    for r in rows:
        values = (r.kind, r.name, f"{r.distribution} {r.version}", r.state, *(getattr(r, name) for name in last))
        cells.append(tuple("".join(c if c.isprintable() else "?" for c in str(v)).strip() or "-" for v in values))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in cells]
    return "\n".join(lines) + "\n"
