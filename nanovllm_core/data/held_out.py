"""Held-out windows in micro-batches of one source each, so that a summed loss belongs to a source.

A model gives the loss of a whole micro-batch; were sources mixed in it, figures by source would need a forward for each
or all its logits. What it costs: at most `ROWS` micro-batches more than mixed ones, each partly filled. Beyond the
`ROWS` - 1 sources with the most text all others share the last row, so 100,000 files make a table of 100 lines.
Documents that are joined into one stream have windows of several sources: then there is one row, of all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from nanovllm_core.contracts import MicroBatch
from nanovllm_core.data.batches import micro_batch
from nanovllm_core.data.chunks import Chunks, Separate
from nanovllm_core.data.packing import pack

Int64 = NDArray[np.int64]
ROWS = 100


@frozen(kw_only=True)
class Row:
    """One line of the table: a source, or several as one."""

    source: str
    text_bytes: int  # UTF-8 bytes of the text whose tokens are predicted


class HeldOut:
    """All windows of `chunks`, each in one micro-batch of at most `rows` sequences of `capacity` tokens."""

    def __init__(self, chunks: Chunks, *, capacity: int, rows: int) -> None:
        self.chunks = chunks
        self.table, row = _rows(chunks)
        self._turns: list[tuple[int, list[int]]] = []  # row, windows
        for r in range(len(self.table)):
            numbers = np.flatnonzero(row == r)
            packing = pack(chunks.lengths[numbers], capacity, 0)
            for start in range(0, len(packing), rows):
                some = (packing.sequence(s) for s in range(start, min(start + rows, len(packing))))
                self._turns.append((r, [int(numbers[w]) for sequence in some for w in sequence]))

    def __len__(self) -> int:
        return len(self._turns)

    def batches(self, *, rank: int = 0, world: int = 1, device: str = "cpu") -> Iterator[tuple[int, MicroBatch]]:
        """This rank's micro-batches, each with the row it counts for; every rank has as many, some without a target."""
        for turn in range(-(-len(self._turns) // world)):
            at = turn * world + rank
            row, windows = self._turns[at] if at < len(self._turns) else (0, [])
            yield row, micro_batch(self.chunks, windows, device)


def _rows(chunks: Chunks) -> tuple[list[Row], Int64]:
    """The table, most text first, and each window's row in it."""
    texts, documents = chunks.texts, chunks.store.documents
    if not isinstance(texts, Separate):
        return [Row(source="(all, joined)", text_bytes=chunks.text_bytes)], np.zeros(len(chunks), np.int64)
    found, source = np.unique(documents["source"][texts.numbers], return_inverse=True)  # of each text
    size = np.zeros(len(found), np.int64)
    np.add.at(size, source, documents["bytes"][texts.numbers])
    order = np.argsort(-size, kind="stable")
    own = order if len(order) <= ROWS else order[: ROWS - 1]
    table = [Row(source=chunks.store.sources[int(found[i])], text_bytes=int(size[i])) for i in own]
    if rest := len(order) - len(own):
        left = int(size[order[len(own) :]].sum())
        table.append(Row(source=f"({rest:,} other sources)", text_bytes=left))
    row = np.full(len(found), len(own), np.int64)
    row[own] = np.arange(len(own))
    return table, row[source[chunks.windows.unit]]
