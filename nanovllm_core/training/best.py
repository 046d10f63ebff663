"""The best evaluation so far, and when to give up waiting for a better one (early stopping).

Best is the lowest `eval_loss` after at least one step. Patience counts evaluations since the loss last fell by more than
`min_delta`: many small steps down that together exceed it count as better.
"""

from __future__ import annotations

import math

from attrs import define, frozen


@frozen(kw_only=True)
class Patience:
    """When a run ends before its last step."""

    evaluations: int  # in a row without a better one
    min_delta: float = 0.0  # by how much eval_loss must fall to be better


@define
class Best:
    """What evaluations have shown; plain numbers, so that a checkpoint can hold them."""

    step: int = 0  # of the lowest eval_loss; 0 until there is one
    eval_loss: float = math.inf
    mark: float = math.inf  # the eval_loss to beat
    waited: int = 0  # evaluations since it was set

    def hear(self, step: int, eval_loss: float, min_delta: float) -> None:
        """Take in an evaluation after `step` steps. A loss that is not a number is no better than any."""
        if eval_loss < self.eval_loss:
            self.step, self.eval_loss = step, eval_loss
        if eval_loss < self.mark - min_delta:
            self.mark, self.waited = eval_loss, 0
        else:
            self.waited += 1

    def exhausted(self, patience: Patience | None) -> bool:
        """Whether to stop."""
        return patience is not None and self.waited >= patience.evaluations
