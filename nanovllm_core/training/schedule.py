"""The learning rate at each step, as a share of its peak: warm-up, then a decay.

A schedule is a function of the step and the run's length alone, so a resumed run needs no state of it, and a longer run
is laid out anew. No step is spent on nothing: the first of a warm-up is above zero, and so is the last of the run.
"""

from __future__ import annotations

import math

from attrs import frozen

DECAY_RATIO, DECAY_SHAPE = 0.2, "1-sqrt"


@frozen(kw_only=True)
class Schedule:
    """Linear warm-up, then the named decay.

    cosine, linear: from the end of the warm-up to the end of the run
    constant: none
    wsd: warm-up, stable, decay (Hu et al., 2024, arXiv 2404.06395): the peak is kept until the last `decay_ratio` of the
      run, which falls by `decay_shape`: linear, or 1 - sqrt of the progress, the better of the two in Hägele et al.,
      2024 (arXiv 2405.18392)
    """

    kind: str
    total: int  # optimizer steps of the run
    warmup: int  # of them
    decay_ratio: float = DECAY_RATIO
    decay_shape: str = DECAY_SHAPE

    def share(self, step: int) -> float:
        """The share of the peak learning rate at a step (0-based)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        progress = max(0.0, (step - self.falls_from) / max(1, self.total - self.falls_from))
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.kind == "linear" or self.decay_shape == "linear":
            return 1.0 - progress
        return 1.0 - math.sqrt(progress)

    @property
    def falls_from(self) -> int:
        """The step (0-based) that the decay counts from: the last at the peak."""
        if self.kind != "wsd":
            return self.warmup
        return max(self.warmup, self.total - max(1, round(self.decay_ratio * self.total)))
