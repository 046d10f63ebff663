"""Bad steps: a loss or gradient norm that is not finite, or a loss far above those before it.

The verdict falls between the backward and the optimizer, so a bad step touches neither weights nor moments. A spike is
judged against the running median, which unlike the mean a spike does not move.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice
from statistics import median

from attrs import frozen

from nanovllm_core.errors import TrainingError

WINDOW, ENOUGH = 64, 16  # good steps that the median is taken over; and how many there must be to judge by it
NAMED = 5  # documents named in a message


@frozen(kw_only=True)
class BadSteps:
    """What is a bad step, and what is done about it."""

    skip: bool = False  # drop the step and go on, rather than stop
    in_a_row: int = 10  # skipped steps after which the run stops all the same
    spike_factor: float | None = None  # a loss above this many medians is bad; None: only one that is not finite


class Guard:
    """Judges each step. `skipped`, `row` and `losses` are its state, plain numbers for a checkpoint."""

    def __init__(self, rule: BadSteps) -> None:
        self.rule = rule
        self.skipped, self.row = 0, 0
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def accept(self, loss: float, norm: float) -> str:
        """Empty for a good step, else what is wrong with it."""
        bad = self._reason(loss, norm)
        if bad:
            self.skipped, self.row = self.skipped + 1, self.row + 1
        else:
            self.row = 0
            self.losses.append(loss)
        return bad

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        factor = self.rule.spike_factor
        if factor is not None and len(self.losses) >= ENOUGH and loss > factor * (usual := median(self.losses)):
            return f"the loss is {loss:.4g}, more than {factor:g} times {usual:.4g}, the median of {len(self.losses)} steps"
        return ""

    def deal(self, step: int, bad: str, documents: Iterable[str]) -> str:
        """What to tell of a skipped step (1-based). Raises TrainingError where the run stops instead."""
        names = list(islice(documents, NAMED + 1))
        more = ", ..." if len(names) > NAMED else ""
        told = f"step {step}: {bad}; its documents: {', '.join(names[:NAMED])}{more}; weights and optimizer stay as they were"
        if not self.rule.skip:
            raise TrainingError(
                f"{told}. To leave such steps out, set train.on_bad_step: skip and run again, which goes on from the newest "
                "checkpoint; or lower train.learning_rate or lengthen train.warmup_steps, which is another run, begins anew "
                "and moves what this one saved to previous/"
            )
        if self.row >= self.rule.in_a_row:
            raise TrainingError(
                f"{told}. That is {self.row} bad steps in a row (train.max_bad_steps). Lower train.learning_rate or look at "
                "these documents"
            )
        return f"{told}; skipped ({self.skipped} so far)"
