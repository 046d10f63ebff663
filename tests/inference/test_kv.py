"""The row cache gives back what was stored, through growth and moves."""

from __future__ import annotations

import torch

from nanovllm_core.contracts import Batch, Shape
from nanovllm_core.inference.kv import STEP, RowCache

SHAPE = Shape(
    family="llama", vocab_size=8, layers=1, hidden=8, heads=4, kv_heads=2, head_dim=3, intermediate=8, tied=True,
    max_positions=4096, parameters=0, operations=(),
)  # fmt: skip


def step(slots: list[int], positions: list[int], context: int) -> Batch:
    n = len(slots)
    return Batch(
        positions=torch.tensor(positions),
        lengths=(1,) * n,
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32),
        slots=torch.tensor(slots),
        context=context,
    )


def test_against_plain_lists() -> None:
    g = torch.Generator().manual_seed(0)
    lengths, limit = [5, 1, STEP - 2], 3 * STEP + 7
    cache = RowCache(3, max(lengths) + 1, limit, SHAPE, torch.float32, "cpu")
    kept = [[torch.randn(2, 2, 3, generator=g) for _ in range(n)] for n in lengths]  # row -> position -> (k, v)
    k, v = torch.stack([kv for row in kept for kv in row]).unbind(1)
    slots = [row for row, n in enumerate(lengths) for _ in range(n)]
    positions = [i for n in lengths for i in range(n)]
    assert cache.update(k, v, step(slots, positions, 0)) is None
    for turn in range(2 * STEP):
        if turn == 40:  # the middle one leaves, the last takes its row
            cache.move(2, 1)
            kept[1] = kept.pop()
        new = torch.randn(len(kept), 2, 2, 3, generator=g)
        for row, kv in zip(kept, new, strict=True):
            row.append(kv)
        sizes = [len(row) for row in kept]
        batch = step(list(range(len(kept))), [n - 1 for n in sizes], max(sizes))
        k_BSKH, v_BSKH = cache.update(*new.unbind(1), batch)
        assert k_BSKH.shape == v_BSKH.shape == (len(kept), max(sizes), 2, 3)
        if turn % 50 == 0 or turn in (39, 40, 41):
            for row, (k_SKH, v_SKH) in enumerate(zip(k_BSKH, v_BSKH, strict=True)):
                wanted = torch.stack(kept[row])
                assert torch.equal(k_SKH[: sizes[row]], wanted[:, 0])
                assert torch.equal(v_SKH[: sizes[row]], wanted[:, 1])
        assert torch.isfinite(v_BSKH).all()
    assert cache.k_BSKH.shape[1] <= limit


def test_values_are_kept_in_the_compute_type() -> None:
    cache = RowCache(1, 4, 4, SHAPE, torch.bfloat16, "cpu")
    assert cache.k_BSKH.shape == (1, 4, 2, 3)
    k_BSKH, _ = cache.update(torch.ones(1, 2, 3), torch.ones(1, 2, 3), step([0], [0], 1))
    assert k_BSKH.dtype == torch.bfloat16
