"""Running a model that keeps no pages: one that keeps its own state, a row a sequence, or one that keeps nothing."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import cast

import torch
from torch import Tensor

from nanovllm_core.contracts import Batch, CachingModule, Module
from nanovllm_core.inference.scheduler import Part
from nanovllm_core.inference.sequence import Sequence

PREFILL = 16_384  # tokens read in one forward pass, unless a single sequence is longer


def _whole(sequences: Many[Sequence], device: str, first_row: int) -> tuple[Tensor, Batch]:
    """Whole sequences, packed; logits are wanted after the last token of each."""
    lengths = torch.tensor([len(s) for s in sequences])
    ends = lengths.cumsum(0)
    batch = Batch(
        positions=torch.cat([torch.arange(len(s)) for s in sequences]).to(device),
        lengths=tuple(lengths.tolist()),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(device, torch.int32),
        select=(ends - 1).to(device),
        slots=torch.arange(first_row, first_row + len(sequences)).repeat_interleave(lengths).to(device),
    )
    return torch.tensor([i for s in sequences for i in s.tokens(0, len(s))], device=device), batch


def _groups(sequences: Many[Sequence]) -> Iterator[tuple[int, int]]:
    """Ranges of sequences that are read together."""
    first, tokens = 0, 0
    for i, sequence in enumerate(sequences):
        if i > first and tokens + len(sequence) > PREFILL:
            yield first, i
            first, tokens = i, 0
        tokens += len(sequence)
    yield first, len(sequences)


class WholeRunner:
    """For models without a cache: each step reads every sequence again."""

    def __init__(self, module: Module, device: str) -> None:
        self.module, self.device = module, device

    def forward(self, parts: Many[Part]) -> Tensor:
        """The logits [n, V] after each sequence."""
        sequences = [part.sequence for part in parts]
        return torch.cat([self.module(*_whole(sequences[a:b], self.device, 0)) for a, b in _groups(sequences)])

    def keep(self, answered: Many[Sequence], tokens_B: Tensor) -> None:
        raise AssertionError("the host knows all tokens")

    def has_kept(self, sequence: Sequence) -> bool:
        return False

    def copy(self, source: int, target: int) -> None:
        raise AssertionError("there are no pages")

    def left(self, row: int, last: int) -> None:
        """Nothing is kept."""


class RowsRunner:
    """For a `CachingModule`: the i-th sequence that runs stands in row i."""

    def __init__(self, module: Module, rows: int, device: str) -> None:
        self.module, self.device = module, device
        self.kv = cast("CachingModule", module).new_cache(rows, device)

    def forward(self, parts: Many[Part]) -> Tensor:
        """The logits [n, V] after each part: new tokens of the first rows, whole sequences in the rows after them."""
        old = [part.sequence for part in parts if part.first]
        new = [part.sequence for part in parts if not part.first]
        found = [self._decode(old)] if old else []
        for a, b in _groups(new) if new else ():
            found.append(self.module(*_whole(new[a:b], self.device, len(old) + a), kv=self.kv))
        return torch.cat(found)

    def _decode(self, sequences: Many[Sequence]) -> Tensor:
        rows, sizes = len(sequences), [len(s) for s in sequences]
        batch = Batch(
            positions=torch.tensor(sizes, device=self.device) - 1,
            lengths=(1,) * rows,
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            slots=torch.arange(rows, device=self.device),
            context=max(sizes),
        )
        return self.module(torch.tensor([s.ids[-1] for s in sequences], device=self.device), batch, kv=self.kv)

    def keep(self, answered: Many[Sequence], tokens_B: Tensor) -> None:
        raise AssertionError("the host knows all tokens")

    def has_kept(self, sequence: Sequence) -> bool:
        return False

    def copy(self, source: int, target: int) -> None:
        raise AssertionError("there are no pages")

    def left(self, row: int, last: int) -> None:
        """The sequence of a row is over; that of the last row goes on there."""
        if row != last:
            for cache in self.kv:
                cache.move(last, row)
