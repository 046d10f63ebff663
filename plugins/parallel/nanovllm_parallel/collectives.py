"""torch.distributed's collectives over one tensor, under the names that they have from torch 2.13 on and before."""

from __future__ import annotations

from typing import Any

from torch import distributed

all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
