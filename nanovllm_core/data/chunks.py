"""Documents cut into windows of at most `length` tokens, as arrays: ten million documents are rows, not objects.

Position i of a text predicts token i + 1, so a text of L tokens has L - 1 positions, and those are what is cut: every
position lies in a window, neighbouring windows share `overlap` positions, and each position is trained in one window
only, the first that holds it; in the next it is context. A last window shorter than `minimum` is moved back to full
length, so it overlaps further; a short text is one window, whole. Its final token is a target and never an input.

Texts are the documents, each by itself, or all of them as one stream with a separator between (never trained, and
neither is a document's first token: figures stay comparable between the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from nanovllm_core.contracts import IGNORE
from nanovllm_core.data.store import Store

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


@frozen(eq=False)
class Windows:
    """One row a window: [start, start + length) of text `unit`; its first `context` positions are trained elsewhere."""

    unit: Int32
    start: Int64
    length: Int32
    context: Int32

    def __len__(self) -> int:
        return len(self.unit)


def windows(lengths: Int64, length: int, overlap: int, minimum: int) -> Windows:
    """Cut texts of these many positions. 0 <= overlap < length; texts of no position have no window."""
    if not 0 <= overlap < length:
        raise ValueError(f"overlap must be at least 0 and below the length {length}, got {overlap}")
    stride = length - overlap
    counts = np.where(lengths <= length, lengths > 0, -(-(lengths - length) // stride) + 1).astype(np.int64)
    unit = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    number = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    limit = lengths[unit]
    start = number * stride
    end = np.minimum(start + length, limit)
    previous_end = np.where(number > 0, start - stride + length, 0)
    tail = (number > 0) & (end == limit) & (end - start < minimum)
    start = np.where(tail, limit - length, start)
    context = np.where(number > 0, previous_end - start, 0)
    return Windows(unit, start, (end - start).astype(np.int32), context.astype(np.int32))


class Texts(Protocol):
    """What windows are cut from."""

    lengths: Int64  # positions of each text

    def read(self, unit: int, start: int, end: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Tokens [start, end) of a text, and which of them are trained."""
        ...

    def documents(self, unit: int, start: int, end: int) -> Int64:
        """Numbers of the documents that have a token there."""
        ...


class Separate:
    """Each document is a text."""

    def __init__(self, store: Store, numbers: Int64) -> None:
        self.store, self.numbers = store, numbers
        self.first = store.documents["start"][numbers].astype(np.int64)
        self.lengths = np.maximum(store.documents["length"][numbers].astype(np.int64) - 1, 0)

    def read(self, unit: int, start: int, end: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        first = int(self.first[unit])
        return self.store.tokens[first + start : first + end], self.store.trained[first + start : first + end]

    def documents(self, unit: int, start: int, end: int) -> Int64:
        return self.numbers[unit : unit + 1]


class Joined:
    """All documents as one text, with the separator's tokens between them."""

    def __init__(self, store: Store, numbers: Int64, separator: Sequence[int]) -> None:
        self.store, self.numbers = store, numbers
        self.separator = np.array(separator, store.tokens.dtype)
        self.first = store.documents["start"][numbers].astype(np.int64)
        self.sizes = store.documents["length"][numbers].astype(np.int64)
        steps = self.sizes + len(separator)
        self.starts = np.cumsum(steps) - steps
        total = int(steps.sum()) - len(separator)
        self.lengths = np.array([max(total - 1, 0)] if len(numbers) else [], np.int64)

    def read(self, unit: int, start: int, end: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        ids = np.empty(end - start, self.store.tokens.dtype)
        marks = np.zeros(end - start, np.uint8)
        for n in range(self._at(start), self._at(end - 1) + 1):
            begin, size = int(self.starts[n]), int(self.sizes[n])
            a, b = max(start, begin), min(end, begin + size)
            if a < b:
                first = int(self.first[n]) - begin
                ids[a - start : b - start] = self.store.tokens[first + a : first + b]
                marks[a - start : b - start] = self.store.trained[first + a : first + b]
            a, b = max(start, begin + size), min(end, begin + size + len(self.separator))
            if a < b:
                ids[a - start : b - start] = self.separator[a - begin - size : b - begin - size]
        return ids, marks

    def documents(self, unit: int, start: int, end: int) -> Int64:
        return self.numbers[self._at(start) : self._at(end - 1) + 1]

    def _at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1


class Chunks:
    """The windows over some documents of a store, with their tokens on demand."""

    def __init__(
        self,
        store: Store,
        numbers: Int64,
        *,
        length: int,
        overlap: int,
        minimum: int,
        separator: Sequence[int] | None = None,
        train_on_overlap: bool = False,
    ) -> None:
        """`separator`: token ids between documents that are joined into one stream; None cuts each by itself.

        `train_on_overlap`: a position that windows share is trained in each of them, not in the first alone.
        """
        self.store = store
        self.texts: Texts = Separate(store, numbers) if separator is None else Joined(store, numbers, separator)
        cut = windows(self.texts.lengths, length, overlap, minimum)
        self.windows = evolve(cut, context=np.zeros_like(cut.context)) if train_on_overlap else cut
        self.text_bytes = int(store.documents["bytes"][numbers].sum())  # whose tokens are trained, each once

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> Int32:
        """Input tokens of each window."""
        return self.windows.length

    def read(self, number: int) -> tuple[Int64, Int64]:
        """Input tokens of a window and their targets: the next token, or IGNORE where it is not trained here."""
        ids, marks = self._tokens(number)
        targets = np.where(marks[1:] > 0, ids[1:].astype(np.int64), IGNORE)
        targets[: self.windows.context[number]] = IGNORE
        return ids[:-1].astype(np.int64), targets

    def following(self, number: int) -> Int64:
        """The token that follows a window's inputs, trained or not: [1]."""
        return self._tokens(number)[0][-1:].astype(np.int64)

    def trained(self, number: int) -> int:
        """How many targets of a window are trained."""
        return int(np.count_nonzero(self._tokens(number)[1][1 + int(self.windows.context[number]) :]))

    def metadata(self, number: int) -> dict[str, Any]:
        """Where a window comes from: source_file, source_files, chunk_index within its text, token_count."""
        w, unit = self.windows, int(self.windows.unit[number])
        start, length = int(w.start[number]), int(w.length[number])
        found = self.texts.documents(unit, start, start + length + 1)
        files = list(dict.fromkeys(self.store.source(int(n)) for n in found))
        first = int(np.searchsorted(w.unit, unit, side="left"))
        return {"source_file": files[0], "source_files": files, "chunk_index": number - first, "token_count": length}

    def _tokens(self, number: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        w = self.windows
        start = int(w.start[number])
        return self.texts.read(int(w.unit[number]), start, start + int(w.length[number]) + 1)
