"""A step's losses and the norm of its gradient, on their way from the device to the host.

They are copied to the host behind the work that makes them and before the optimizer's, which the host queues at once unless it
must judge the loss first (`train.spike_factor`): it waits for the copy alone, and the device has the optimizer's step to do while
the host prepares the next forward.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Figures:
    """losses [turns, data ranks], each a part of the step's loss; norm: a scalar."""

    def __init__(self, losses: Tensor, norm: Tensor) -> None:
        # Losses in one order, whoever made them.
        values = torch.cat([losses.double().t().flatten(), norm.double().reshape(1)])
        self.not_finite = values.isfinite().all().logical_not().float()  # 1 or 0, on the device
        self.copied: torch.cuda.Event | None = None
        self.values = values
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values = pinned.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.copied.record()

    def read(self) -> tuple[float, float]:
        """The step's loss and its gradient's norm."""
        if self.copied is not None:
            self.copied.synchronize()
        *losses, norm = self.values.tolist()
        return sum(losses), norm
