"""Random numbers without a state: what seed and position give, they give anywhere and at any time.

Philox with 4 x 32 bits and ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is the seed,
the counter the position of a token in its sequence, so an answer that was put back and begins again draws as it had, and
nothing is to be kept for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key's halves each round
LOW = 0xFFFFFFFF


def philox(counters_4N: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Four random words of 32 bits for each counter of four, under a key of 64 bits."""
    a, b, c, d = counters_4N
    low, high = key & LOW, key >> 32
    for _ in range(10):
        left, right = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, c = (right >> 32) ^ b ^ np.uint64(low), (left >> 32) ^ d ^ np.uint64(high)
        b, d = right & LOW, left & LOW
        low, high = (low + WEYL[0]) & LOW, (high + WEYL[1]) & LOW
    return np.stack([a, b, c, d])


def uniforms(seed: int, first: int, count: int) -> NDArray[np.float64]:
    """Two numbers in [0, 1) for each of the positions from `first` on, [count, 2]: multiples of 2**-53."""
    position = np.arange(first, first + count, dtype=np.uint64)
    nothing = np.zeros_like(position)
    a, b, c, d = philox(np.stack([position & LOW, position >> 32, nothing, nothing]), seed)
    pairs = np.stack([(a >> 5, b >> 6), (c >> 5, d >> 6)])
    found: NDArray[np.float64] = ((pairs[:, 0] * 2.0**26 + pairs[:, 1]) * 2.0**-53).T
    return found
