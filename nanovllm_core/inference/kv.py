"""Keys and values of one block, one contiguous row a sequence.

A row is as long as the longest sequence of its batch, so short sequences waste the rest; in exchange decoding reads a
view and copies nothing. Rows grow by doubling. A block holds
2 x rows x length x kv_heads x head_dim values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm_core.contracts import Batch, Shape

STEP = 256  # positions; lengths are multiples of it, unless the limit is reached


class RowCache:
    """`contracts.KV` over rows. When decoding, `batch.slots` must be 0, 1, ..., B - 1: `move` closes gaps."""

    def __init__(self, rows: int, length: int, limit: int, shape: Shape, dtype: torch.dtype, device: str) -> None:
        """`length`: positions needed at once; `limit`: positions that no sequence will exceed."""
        self.limit = limit
        size = (rows, self._rounded(length), shape.kv_heads, shape.head_dim)
        self.k_BSKH = torch.zeros(size, dtype=dtype, device=device)  # zeros: what is masked must be finite
        self.v_BSKH = torch.zeros(size, dtype=dtype, device=device)

    def update(self, k_TKH: Tensor, v_TKH: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Store the new tokens. None after a prefill; else keys and values of the first B rows, [B, S, K, H]."""
        assert batch.slots is not None
        if batch.context > self.k_BSKH.shape[1]:
            self._grow(max(batch.context, 2 * self.k_BSKH.shape[1]))
        self.k_BSKH[batch.slots, batch.positions] = k_TKH.to(self.k_BSKH.dtype)
        self.v_BSKH[batch.slots, batch.positions] = v_TKH.to(self.v_BSKH.dtype)
        if batch.context == 0:
            return None
        rows = len(batch.lengths)
        return self.k_BSKH[:rows, : batch.context], self.v_BSKH[:rows, : batch.context]

    def move(self, source: int, target: int) -> None:
        """Let the sequence of row `source` go on in row `target`."""
        self.k_BSKH[target] = self.k_BSKH[source]
        self.v_BSKH[target] = self.v_BSKH[source]

    def _rounded(self, length: int) -> int:
        return min(-(-length // STEP) * STEP, self.limit)

    def _grow(self, length: int) -> None:
        more = self._rounded(length) - self.k_BSKH.shape[1]
        pad = (0, 0, 0, 0, 0, more)
        self.k_BSKH = torch.nn.functional.pad(self.k_BSKH, pad)
        self.v_BSKH = torch.nn.functional.pad(self.v_BSKH, pad)
