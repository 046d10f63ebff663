"""Which parameters are trained, and from which step on: freezing for good and unfreezing by schedule.

A frozen parameter has no gradient and no optimizer state, and comes out as it went in. When it thaws its moments begin
at zero, with AdamW's correction for that, as every parameter's do at step one. Tied weights are one parameter under one
name, so they freeze as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from attrs import field, frozen

from nanovllm_core.contracts import Module
from nanovllm_core.errors import RecipeError, nearest

NEVER = 1 << 62


def moment(instance: Any, attribute: Any, value: Any) -> None:
    """An attrs validator: a moment of a run, as a step (an integer) or as a share of the run (a fraction)."""
    if value is not None and not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise ValueError(f"got {value}, allowed: a step (1, 2, ...) or a share of the run (above 0.0, below 1.0)")


@frozen(kw_only=True)
class Thaw:
    """Parameters that are frozen until a moment of the run.

    at: a step, or a share of the run
    parameters: patterns over their names
    """

    at: int | float = field(validator=moment)
    parameters: tuple[str, ...]


@frozen(kw_only=True)
class Freezing:
    """What the recipe says. Patterns are those of fnmatch, over parameter names.

    Gradual unfreezing from the top down is Howard and Ruder's, 2018 (arXiv 1801.06146).
    """

    freeze: tuple[str, ...] = ()
    unfreeze: tuple[Thaw, ...] = ()
    blocks_every: int | float | None = None

    def __bool__(self) -> bool:
        return bool(self.freeze or self.unfreeze or self.blocks_every)

    def trained_from(self, module: Module, total: int) -> dict[str, int]:
        """Each parameter's first step (0-based) in a run of `total`; NEVER for what stays frozen.

        In order, the later word counts: blocks one by one from the last, then `freeze`, then `unfreeze` (of several
        that name a parameter, the earliest). Raises RecipeError for a pattern that names no parameter, or when nothing
        is left to train.
        """
        first = {name: 0 for name, _ in module.named_parameters()}
        if self.blocks_every is not None:
            first |= _from_the_top(module, _step(self.blocks_every, total))
        for pattern in self.freeze:
            first |= dict.fromkeys(_matching(pattern, first, "train.freeze"), NEVER)
        thawed: dict[str, int] = {}
        for i, thaw in enumerate(self.unfreeze):
            at = _step(thaw.at, total)
            for pattern in thaw.parameters:
                for name in _matching(pattern, first, f"train.unfreeze[{i}].parameters"):
                    thawed[name] = min(at, thawed.get(name, NEVER))
        first |= thawed
        if min(first.values()) > 0:
            raise RecipeError(
                "train.freeze: nothing is left to train in the first step; freeze less, e.g. only `model.layers.0.*`"
            )
        return first


def _step(at: int | float, total: int) -> int:
    return at if isinstance(at, int) else max(1, round(at * total))


def _from_the_top(module: Module, every: int) -> dict[str, int]:
    """The last block is trained from the start, each earlier one `every` steps after the one behind it."""
    turn = {id(p): i * every for i, block in enumerate(reversed(module.blocks)) for p in block.parameters()}
    return {name: turn[id(p)] for name, p in module.named_parameters() if id(p) in turn}


def _matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    known = list(names)
    if found := [name for name in known if fnmatchcase(name, pattern)]:
        return found
    near = nearest(pattern, known) or f"; its parameters are named {known[0]}, ..., {known[-1]}"
    raise RecipeError(f"{where}: {pattern!r} matches no parameter of the model{near}")


def freeze_until(module: Module, first: Mapping[str, int], step: int) -> list[str]:
    """Set which parameters are trained in a step (0-based), by each one's first; the names that thaw with it."""
    thawed = []
    for name, parameter in module.named_parameters():
        trained = first.get(name, 0) <= step
        if trained and not parameter.requires_grad:
            thawed.append(name)
        parameter.requires_grad_(trained)
    return thawed
