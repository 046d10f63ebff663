"""Packed sequences -> micro-batches of tensors. What a run sees is a function of (seed, position) alone.

Epochs follow each other in one stream of sequences, each epoch in an order of its own drawn from (seed, epoch); a step
takes the next `rows_per_step` of them, and each rank its contiguous part. The position is how many sequences all ranks
have consumed: one number resumes a run, on any number of ranks. Reading is a memory-mapped copy, some microseconds a
window, in the calling thread: nothing is prefetched and no random state but the seed's is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm_core.contracts import IGNORE, Batch, MicroBatch, Step
from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.packing import Packing

Int64 = NDArray[np.int64]


class Batches:
    """The steps of a run, for one rank.

    rows_per_step: sequences of an optimizer step over all ranks
    rows: sequences of a micro-batch
    epochs: passes over all sequences; None is endless
    """

    def __init__(
        self,
        chunks: Chunks,
        packing: Packing,
        *,
        seed: int,
        rows_per_step: int,
        rows: int,
        epochs: float | None = None,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        ordered: bool = False,
    ) -> None:
        """`ordered`: a step is always the same micro-batches, some perhaps empty, of which each rank has its share in order."""
        if not len(packing):
            raise ValueError("there is nothing to train on: no sequence")
        self.chunks, self.packing, self.seed = chunks, packing, seed
        self.rows_per_step, self.rows, self.rank, self.world, self.device = rows_per_step, rows, rank, world, device
        self.total = None if epochs is None else max(1, math.ceil(epochs * len(packing)))
        self.ordered = ordered
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run, the last perhaps shorter; None when it is endless."""
        return None if self.total is None else -(-self.total // self.rows_per_step)

    def step(self, position: int) -> Step:
        """This rank's part of the step that begins `position` sequences into the run."""
        end = self._end(position)
        sequences = self.sequences(position, end)
        if self.ordered:
            share = self.rows_per_step // self.world
            mine, turns = sequences[self.rank * share : (self.rank + 1) * share], share // self.rows
        else:
            mine = _part(sequences, self.rank, self.world)
            turns = _turns(len(sequences), self.rows, self.world)
        micro = tuple(_micro_batches(self.chunks, self.packing, mine, turns, self.rows, self.device))
        if self.world == 1:
            trained = sum(m.trained for m in micro)
        else:
            trained = sum(self.chunks.trained(int(w)) for s in sequences for w in self.packing.sequence(int(s)))
        tokens = sum(int(self.chunks.lengths[self.packing.sequence(int(s))].sum()) for s in sequences)
        return Step(
            micro_batches=micro, trained=trained, tokens=tokens, next_position=end, epoch=end / len(self.packing)
        )

    def sources(self, position: int) -> Iterator[str]:
        """Names of the sources in the step that begins there, over all ranks, each once."""
        told: set[str] = set()
        for sequence in self.sequences(position, self._end(position)):
            for window in self.packing.sequence(int(sequence)):
                for name in self.chunks.metadata(int(window))["source_files"]:
                    if name not in told:
                        told.add(name)
                        yield name

    def sequences(self, begin: int, end: int) -> Int64:
        """Numbers of the sequences at positions [begin, end) of the run."""
        parts = []
        while begin < end:
            epoch, first = divmod(begin, len(self.packing))
            part = self._in_epoch(epoch)[first : first + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)

    def _end(self, position: int) -> int:
        end = position + self.rows_per_step
        if self.total is not None:
            end = min(end, self.total)
        if not 0 <= position < end:
            raise ValueError(f"position {position} is outside the run's {self.total} sequences")
        return end

    def _in_epoch(self, epoch: int) -> Int64:
        if epoch != self._epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, 2, epoch])).random_raw(len(self.packing))
            self._epoch, self._order = epoch, np.argsort(bits, kind="stable").astype(np.int64)
        return self._order


def _part(sequences: Int64, rank: int, world: int) -> Int64:
    return sequences[len(sequences) * rank // world : len(sequences) * (rank + 1) // world]


def _turns(sequences: int, rows: int, world: int) -> int:
    """Micro-batches of the rank with most sequences."""
    return math.ceil(math.ceil(sequences / world) / rows)


def _micro_batches(
    chunks: Chunks, packing: Packing, sequences: Int64, turns: int, rows: int, device: str
) -> Iterator[MicroBatch]:
    """`turns` micro-batches, so that ranks with fewer sequences take part in every exchange of a step."""
    for turn in range(turns):
        mine = sequences[turn * rows : (turn + 1) * rows]
        yield micro_batch(chunks, [int(w) for s in mine for w in packing.sequence(int(s))], device)


def micro_batch(chunks: Chunks, numbers: list[int], device: str) -> MicroBatch:
    """These windows end to end; without any, one token and nothing to learn."""
    pairs = [chunks.read(n) for n in numbers] or [(np.zeros(1, np.int64), np.full(1, IGNORE, np.int64))]
    lengths = tuple(len(tokens) for tokens, _ in pairs)
    targets = np.concatenate([t for _, t in pairs])

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else made.to(device)

    return MicroBatch(
        tokens=tensor(np.concatenate([t for t, _ in pairs])),
        targets=tensor(targets),
        batch=Batch(
            positions=tensor(np.concatenate([np.arange(n) for n in lengths])),
            lengths=lengths,
            cu_seqlens=tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        ),
        trained=int(np.count_nonzero(targets != IGNORE)),
    )
