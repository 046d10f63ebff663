"""Packing: every window exactly once, none too full, as good as best fit done one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.data.packing import pack


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each sequence, by the textbook."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [(r, i) for i, r in enumerate(room) if r >= length]
        if fits:
            room[min(fits)[1]] -= length
        else:
            room.append(capacity - length)
    return room


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_every_window_once_and_no_overflow(data: st.DataObject, capacity: int, seed: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), np.int32)
    packed = pack(lengths, capacity, seed)
    assert sorted(packed.windows.tolist()) == list(range(len(lengths)))
    sums = [int(lengths[packed.sequence(i)].sum()) for i in range(len(packed))]
    assert all(0 < s <= capacity for s in sums)
    assert sorted(capacity - s for s in sums) == sorted(best_fit_one_by_one(lengths.tolist(), capacity))
    assert packed.fill == pytest.approx(sum(sums) / (capacity * len(sums)) if sums else 0.0)


def test_decided_by_the_seed_and_constant_in_number() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 2000).astype(np.int32)
    a, b, c = pack(lengths, 128, 1), pack(lengths, 128, 1), pack(lengths, 128, 2)
    assert np.array_equal(a.windows, b.windows)
    assert not np.array_equal(a.windows, c.windows)
    assert len(a) == len(c)


def test_a_million_windows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1.2, 1_000_000), 1, 2048).astype(np.int32)
    packed = pack(lengths, 2048, 0)
    assert np.array_equal(np.sort(packed.windows), np.arange(len(lengths)))
    assert packed.fill > 0.99


def test_windows_that_do_not_fit_are_refused() -> None:
    for wrong in ([0], [9]):
        with pytest.raises(ValueError, match="1 to 8 tokens"):
            pack(np.array(wrong), 8, 0)
