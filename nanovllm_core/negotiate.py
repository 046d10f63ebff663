"""The one way in which a component is chosen: ask every candidate's `probe`, keep every answer with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import Accept, Refuse, Verdict
from nanovllm_core.errors import AmbiguousComponent, RefusedError, reason
from nanovllm_core.installed import Entry


@frozen(kw_only=True, eq=False)
class Candidate:
    """A component ready to be asked, or the reason why it cannot even be asked."""

    entry: Entry
    component: Any = None
    unusable: str = ""
    misfit: bool = False  # unusable because the options given are not its own
    at: tuple[str | int, ...] = ()  # where the recipe names it


@frozen(kw_only=True, eq=False)
class Choice:
    """What fills a slot, why, and who else was asked."""

    slot: str  # e.g. "kernels.attention"
    entry: Entry
    component: Any
    by: str  # "recipe" (named there) | "default" | "auto"
    why: str
    accept: Accept
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason)
    at: tuple[str | int, ...] = ()  # where the recipe names it


@frozen
class Fault(Refuse):
    """A no that is the component's own mistake."""


def ask(candidate: Candidate, probe: Callable[[Any], object]) -> Verdict:
    """A candidate's verdict; a probe that raises or answers nonsense is a refusal that says so."""
    if candidate.unusable:
        return Refuse(candidate.unusable)
    try:
        verdict = probe(candidate.component)
    except (Exception, SystemExit) as e:  # a stranger's probe may raise anything; its reason is kept
        return Fault(f"its probe raised {reason(e)}")
    if isinstance(verdict, (Accept, Refuse)):
        return verdict
    return Fault(f"its probe answered {verdict!r}, neither Accept nor Refuse")


def usable(slot: str, candidates: Sequence[Candidate], place: object = None) -> list[Candidate]:
    """Those that can be asked, where all of a list are. Raises RefusedError when none can."""
    found = [c for c in candidates if not c.unusable]
    if not found:
        reasons = "".join(f"\n  {c.entry.name}: {c.unusable}" for c in candidates) or " (none is named or installed)"
        raise RefusedError(f"{_said(slot, place)}: no component can be used:{reasons}")
    return found


def choose(
    slot: str, candidates: Sequence[Candidate], probe: Callable[[Any], object], by: str, place: object = None
) -> Choice:
    """The accepting candidate of highest priority; `place` is where the recipe fills the slot, if it does.

    Raises RefusedError when none accepts (a named component that refuses is an error, never a fallback; where the
    options fit some candidates, only their reasons are given) and AmbiguousComponent when two tie.
    """
    accepted: list[tuple[Accept, Candidate]] = []
    refused: list[tuple[str, str]] = []
    for c in candidates:
        verdict = ask(c, probe)
        if isinstance(verdict, Accept):
            accepted.append((verdict, c))
        else:
            refused.append((c.entry.name, verdict.why))
    said = _said(slot, place)
    if not accepted:
        meant = [told for c, told in zip(candidates, refused, strict=True) if not c.misfit] or refused
        if len(meant) == 1:
            raise RefusedError(f"{said}: {meant[0][0]} refuses: {meant[0][1]}")
        reasons = (
            "".join(f"\n  {name}: {why}" for name, why in meant) or " (none is installed, or --without leaves them out)"
        )
        raise RefusedError(f"{said}: no component accepts:{reasons}")
    accepted.sort(key=lambda pair: -pair[0].priority)
    best, winner = accepted[0]
    ties = [c.entry.full_name for a, c in accepted if a.priority == best.priority]
    if len(ties) > len(set(ties)):
        raise AmbiguousComponent(f"{slot}: {ties[0]} is named twice and accepts both times; name it once")
    if len(ties) > 1:
        raise AmbiguousComponent(
            f"{said}: {', '.join(sorted(ties))} accept with equal priority {best.priority}; name one of them"
        )
    lost = tuple((c.entry.name, f"accepts with lower priority {a.priority}: {a.why}") for a, c in accepted[1:])
    return Choice(
        slot=slot, entry=winner.entry, component=winner.component, by=by, why=best.why, accept=best,
        refused=(*lost, *refused), at=winner.at,
    )  # fmt: skip


def _said(slot: str, place: object) -> str:
    return f"{place}: {slot}" if place else slot
