"""The way of numbers from the host to the device, for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(values: object, dtype: torch.dtype, device: str) -> Tensor:
    """Where a device reads by itself, on the host."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device == "cpu" else tensor.pin_memory()


def sent(values: object, dtype: torch.dtype, device: str) -> Tensor:
    """On the device, through memory that it reads by itself; what was queued before goes on meanwhile."""
    return kept(values, dtype, device).to(device, non_blocking=True)
