"""Windows laid into sequences of at most `capacity` tokens, so that nearly every token of a batch is a real one.

Best fit, longest first: each window goes where it leaves the least room (Johnson, 1973: at most 11/9 of the fewest
sequences possible; on documents the fill is usually above 99 %). Windows of one length are placed together, so the work
is one array operation for each pair of lengths that meet: a million windows take well under a second. Decided once a
run, by the seed (which windows of one length go where); epochs shuffle sequences, so each has the same number of them.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@frozen(eq=False)
class Packing:
    """Which windows make which sequence: those of sequence i are windows[starts[i]:starts[i + 1]]."""

    windows: Int64
    starts: Int64
    fill: float  # share of all sequences' room that holds tokens

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sequence(self, number: int) -> Int64:
        """The windows of one sequence."""
        return self.windows[self.starts[number] : self.starts[number + 1]]


def pack(lengths: NDArray[np.integer], capacity: int, seed: int) -> Packing:
    """Sequences of at most `capacity` tokens for windows of 1..capacity tokens; every window is in exactly one."""
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"windows must have 1 to {capacity} tokens, got {int(lengths.min())} to {int(lengths.max())}")
    bits = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(len(lengths))
    shuffled = np.argsort(bits, kind="stable")
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    sequence, count = _best_fit(lengths[order], capacity)
    by_sequence = np.argsort(sequence, kind="stable")
    sizes = np.bincount(sequence, minlength=count)
    fill = float(lengths.sum(dtype=np.int64)) / (count * capacity) if count else 0.0
    return Packing(order[by_sequence].astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), fill)


def _best_fit(lengths: NDArray[np.integer], capacity: int) -> tuple[Int64, int]:
    """The sequence of each window, lengths descending, and how many sequences there are."""
    sequence = np.empty(len(lengths), np.int64)
    room: dict[int, list[Int64]] = {}  # tokens still free -> sequences
    free = 0  # bit r is set where room[r] has sequences
    count = 0
    values, firsts = np.unique(-lengths.astype(np.int64), return_index=True)
    lasts = np.append(firsts, len(lengths))[1:]
    for length, first, last in zip((-values).tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        while first < last:
            fits = free >> length
            if fits:
                r = length + (fits & -fits).bit_length() - 1
                open_ = np.concatenate(room.pop(r)) if len(room[r]) > 1 else room.pop(r)[0]
                free &= ~(1 << r)
            else:
                r = capacity
                open_ = np.arange(count, count + -(-(last - first) // (r // length)))
                count += len(open_)
            each = r // length  # a sequence with the least room keeps it until this length no longer fits
            used = min(len(open_), -(-(last - first) // each))
            placed = min(last - first, used * each)
            sequence[first : first + placed] = np.repeat(open_[:used], each)[:placed]
            first += placed
            full, rest = divmod(placed, each)
            for left, ids in (
                (r - each * length, open_[:full]),
                (r - rest * length, open_[full:used]),
                (r, open_[used:]),
            ):
                if left and len(ids):
                    room.setdefault(left, []).append(ids)
                    free |= 1 << left
    return sequence, count
