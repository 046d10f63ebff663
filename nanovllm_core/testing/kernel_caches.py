"""Caches for kernels under test (`contracts.KV`), with poison wherever nothing is to be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm_core.contracts import Batch, KernelRequest

UNWRITTEN = 3e4  # within a row, beyond its sequence: an engine's memory is finite there, and may hold anything


class Prefilled:
    """Keeps what it is given, and answers as after a prefill."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor]] = []

    def update(self, k_TKH: Tensor, v_TKH: Tensor, batch: Batch) -> None:
        self.given.append((k_TKH.clone(), v_TKH.clone()))


class Half:
    """Sequences that are generated: each row holds its past, seeded, and room for one token more."""

    def __init__(self, request: KernelRequest, places: Sequence[int]) -> None:
        shape, dtype, generator = request.shape, getattr(torch, request.dtype), torch.Generator().manual_seed(3)
        size = (len(places) + 1, max(places) + 4, shape.kv_heads, shape.head_dim)
        self.k, self.v = (torch.full(size, torch.nan, dtype=dtype, device=request.device) for _ in range(2))
        for memory in (self.k, self.v):
            memory[: len(places), : max(places) + 1] = UNWRITTEN
            for row, place in enumerate(places):
                memory[row, :place] = torch.randn((place, *size[2:]), generator=generator).to(memory)

    def update(self, k_TKH: Tensor, v_TKH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        for memory, new in ((self.k, k_TKH), (self.v, v_TKH)):
            memory[batch.slots, batch.positions] = new.to(memory.dtype)
        rows = len(batch.lengths)
        return self.k[:rows, : batch.context], self.v[:rows, : batch.context]


def decoding(places: Sequence[int], device: str) -> Batch:
    """One new token a row, at these positions."""
    rows = len(places)
    return Batch(
        positions=torch.tensor(places, device=device),
        lengths=(1,) * rows,
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=device),
        slots=torch.arange(rows, device=device),
        context=max(places) + 1,
    )
