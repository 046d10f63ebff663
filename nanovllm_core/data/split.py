"""Which documents are held out for evaluation: a function of their number, the fraction and the seed alone.

Documents get 64 random bits each, in order; those with the smallest are held out. The bits come from PCG64's raw
stream, which NumPy promises to keep; its `permutation` and `choice` may change between versions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def held_out(count: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """The held-out document numbers, ascending: at least one, never all; none of a single document or at fraction 0."""
    if count < 2 or fraction <= 0:
        return np.empty(0, np.int64)
    size = min(count - 1, max(1, round(count * fraction)))
    bits = np.random.PCG64(np.random.SeedSequence([seed, 0])).random_raw(count)
    return np.sort(np.argsort(bits, kind="stable")[:size]).astype(np.int64)


def kept(count: int, out: NDArray[np.int64]) -> NDArray[np.int64]:
    """The document numbers that are trained on, ascending."""
    mask = np.ones(count, bool)
    mask[out] = False
    return np.flatnonzero(mask).astype(np.int64)
