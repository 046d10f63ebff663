"""Which documents are held out for evaluation: a function of their content, the fraction and the seed alone.

Every content gets 64 random bits from its hash and the seed; those with the smallest are held out. So exact copies fall
on one side, and neither names, order nor other documents move one. The fraction is met as near as whole groups of copies
allow: a group that would exceed it is passed over.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]


def held_out(contents: UInt64, fraction: float, seed: int) -> NDArray[np.int64]:
    """The held-out document numbers, ascending: at least one, never all; none where all are the same, or at fraction 0."""
    kinds, group, sizes = np.unique(contents, return_inverse=True, return_counts=True)
    if len(kinds) < 2 or fraction <= 0:
        return np.empty(0, np.int64)
    order = np.argsort(_mixed(kinds, seed), kind="stable")
    wanted = min(len(contents) - 1, max(1, round(len(contents) * fraction)))
    chosen = np.zeros(len(kinds), bool)
    chosen[_fill(order, sizes[order], wanted)] = True
    if not chosen.any():  # every group is larger than what is wanted
        chosen[order[np.argmin(sizes[order])]] = True
    return np.flatnonzero(chosen[group]).astype(np.int64)


def kept(count: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
    """The document numbers that are trained on, ascending."""
    mask = np.ones(count, bool)
    mask[out] = False
    return np.flatnonzero(mask).astype(np.int64)


def _fill(order: NDArray[np.int64], sizes: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """The groups that are taken: in order, each one that still fits."""
    taken: list[NDArray[np.int64]] = []
    while wanted and len(order):
        fits = sizes <= wanted
        order, sizes = order[fits], sizes[fits]
        run = int(np.searchsorted(np.cumsum(sizes), wanted, side="right"))  # groups that fit one after the other
        taken.append(order[:run])
        wanted -= int(sizes[:run].sum())
        order, sizes = order[run:], sizes[run:]
    return np.concatenate(taken) if taken else np.empty(0, np.int64)


def _mixed(values: UInt64, seed: int) -> UInt64:
    """64 bits of each value and the seed (the finaliser of SplitMix64: Steele, Lea, Flood 2014); one to one."""
    key = np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0]
    z: UInt64 = values ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
