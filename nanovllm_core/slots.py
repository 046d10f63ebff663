"""From what a recipe names to components ready to be asked: load the class, structure its options, keep every reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen

from nanovllm_core.errors import BrokenComponent, ComponentError, OptionError, UnknownComponent, listed
from nanovllm_core.negotiate import Candidate
from nanovllm_core.recipe import AUTO, Component, Recipe
from nanovllm_core.registry import Entry, Registry
from nanovllm_core.structure import line, path_text, structure


@frozen
class Slots:
    """Fills a recipe's slots from a registry."""

    registry: Registry
    recipe: Recipe

    def named(self, kind: str, wanted: Component) -> Candidate:
        """The component that the recipe names. Raises when it is unknown, ambiguous, broken or misconfigured."""
        if wanted.use == AUTO.use:
            names = listed(e.name for e in self.registry.of_kind(kind))
            place = line("`auto` chooses nothing here", wanted.at, self.recipe.text)
            raise UnknownComponent(f"{place}; name the {kind} that you want (installed: {names})")
        try:
            entry = self.registry.find(kind, wanted.use)
        except ComponentError as e:
            raise type(e)(line(str(e), wanted.at, self.recipe.text)) from None
        return Candidate(entry=entry, component=self._make(entry, wanted), at=wanted.at)

    def candidates(self, kind: str, wanted: Sequence[Component]) -> tuple[list[Candidate], str]:
        """Who is asked for a slot, and by what: each named component, and for `auto` all others of the kind, by name."""
        named = [self.named(kind, w) for w in wanted if w.use != AUTO.use]
        taken = {(c.entry.name, c.entry.distribution) for c in named}
        autos = [w for w in wanted if w.use == AUTO.use]
        found = list(named)
        for auto in autos[:1]:
            found += [
                self._asked(entry, auto)
                for entry in sorted(self.registry.of_kind(kind), key=lambda e: (e.name, e.distribution))
                if (entry.name, entry.distribution) not in taken
            ]
        return found, "auto" if autos else "recipe"

    def _asked(self, entry: Entry, auto: Component) -> Candidate:
        try:
            return Candidate(entry=entry, component=self._make(entry, auto), at=auto.at)
        except (BrokenComponent, OptionError) as e:
            return Candidate(entry=entry, unusable=str(e), misfit=isinstance(e, OptionError))

    def _make(self, entry: Entry, wanted: Component) -> Any:
        loaded = self.registry.load(entry)
        if not isinstance(loaded, type):
            if wanted.options:
                raise OptionError(
                    f"{path_text(wanted.at)}: {entry.label} was given ready-made and takes no options; got {sorted(wanted.options)}"
                )
            return loaded
        return structure(
            dict(wanted.options),
            loaded,
            path=wanted.at,
            places=self.recipe.text,
            base=self.recipe.base,
            error=OptionError,
        )
