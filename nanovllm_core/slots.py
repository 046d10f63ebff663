"""From what a recipe names to components ready to be asked: load the class, structure its options, keep every reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import frozen

from nanovllm_core.errors import BrokenComponent, ComponentError, NanoError, OptionError, UnknownComponent, listed
from nanovllm_core.installed import Entry
from nanovllm_core.negotiate import Candidate
from nanovllm_core.recipe import AUTO, Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.structure import line, structure
from nanovllm_core.yamltext import KeyPath, Place

OURS = "nanovllm"  # the distribution of the components that recipes get by default


@frozen
class Slots:
    """Fills a recipe's slots from a registry."""

    registry: Registry
    recipe: Recipe

    def named(self, kind: str, wanted: Component, home: Sequence[str] | None = None) -> Candidate:
        """The component that the recipe names. Raises when it is unknown, ambiguous, broken or misconfigured.

        Where several distributions offer a name that nobody wrote (a default), that of the first in `home` is meant: the
        one that says so, else ours. So an installation cannot change what a recipe without it does.
        """
        text, at = self.recipe.text, wanted.at
        if wanted.use == AUTO.use:
            names = listed(e.name for e in self.registry.of_kind(kind))
            place = line("`auto` chooses nothing here", at, text)
            raise UnknownComponent(f"{place}; name the {kind} that you want (installed: {names})")
        if home is None:
            home = () if at else (OURS,)
        try:
            entry = self.registry.find(kind, wanted.use, home=home)
            return Candidate(entry=entry, component=self._make(entry, wanted), at=at)
        except ComponentError as e:
            name = (*at, "use")
            raise type(e)(line(str(e), name if name in text.places else at, text)) from None

    def place(self, at: KeyPath) -> Place | None:
        """Where the recipe writes what stands at `at`; None where it does not."""
        return self.recipe.text.places.get(at) if at else None

    @contextmanager
    def placed(self, at: KeyPath) -> Iterator[None]:
        """What a component's hooks raise within the block is told with the component's place, where it has one."""
        try:
            yield
        except NanoError as e:
            if self.place(at) is None:
                raise
            raise type(e)(line(str(e), at, self.recipe.text)) from e

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
            return Candidate(entry=entry, unusable=" ".join(str(e).split()), misfit=isinstance(e, OptionError))

    def _make(self, entry: Entry, wanted: Component) -> Any:
        loaded = self.registry.load(entry)
        if not isinstance(loaded, type):
            if wanted.options:
                text = f"{entry.label} was given ready-made and takes no options; got {', '.join(wanted.options)}"
                raise OptionError(line(text, wanted.at, self.recipe.text))
            return loaded
        return structure(
            dict(wanted.options),
            loaded,
            path=wanted.at,
            places=self.recipe.text,
            base=self.recipe.base,
            error=OptionError,
        )
