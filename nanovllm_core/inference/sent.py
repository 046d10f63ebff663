"""The way of numbers from the host to the device, for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: object, dtype: torch.dtype, device: str) -> Tensor:
    """On the device, through memory that it reads by itself; what was queued before goes on meanwhile."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
