"""Batches: what a run sees depends on seed and position alone, not on ranks; documents never see each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.contracts import IGNORE, MicroBatch
from nanovllm_core.data.batches import Batches
from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.packing import Packing, pack
from nanovllm_core.data.store import open_or_build


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, memory, letters) -> Chunks:
    rng = np.random.default_rng(5)
    texts = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 90, 60)]
    values: dict[str, list[object]] = {"a": [*texts[:30]], "b": [("question " * 3, t) for t in texts[30:]]}
    store = open_or_build(tmp_path_factory.mktemp("t"), "k" * 64, memory(values), letters())
    return Chunks(store, np.arange(60), length=32, overlap=6, minimum=8)


@pytest.fixture(scope="module")
def packing(chunks: Chunks) -> Packing:
    return pack(chunks.lengths, 32, 7)


def spans(micro: MicroBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The windows of a micro-batch, tokens and targets, leaving idle ones out."""
    bounds = np.cumsum([0, *micro.batch.lengths])
    rows = [(micro.tokens[a:b].tolist(), micro.targets[a:b].tolist()) for a, b in pairwise(bounds)]
    return [(tuple(t), tuple(g)) for t, g in rows if (t, g) != ([0], [IGNORE])]


def test_a_micro_batch(chunks: Chunks, packing: Packing) -> None:
    step = Batches(chunks, packing, seed=1, rows_per_step=6, rows=2).step(0)
    assert len(step.micro_batches) == 3
    for micro in step.micro_batches:
        size = len(micro.tokens)
        assert size == len(micro.targets) == len(micro.batch.positions) == sum(micro.batch.lengths) <= 64
        assert (micro.tokens.dtype, micro.targets.dtype) == (torch.int64, torch.int64)
        assert micro.batch.cu_seqlens.dtype == torch.int32
        assert micro.batch.cu_seqlens.tolist() == np.cumsum([0, *micro.batch.lengths]).tolist()
        assert micro.batch.positions.tolist() == [p for n in micro.batch.lengths for p in range(n)]
        assert micro.trained == int((micro.targets != IGNORE).sum())
    assert step.trained == sum(m.trained for m in step.micro_batches)
    assert step.tokens == sum(len(m.tokens) for m in step.micro_batches)
    assert (step.next_position, step.epoch) == (6, 6 / len(packing))


@settings(max_examples=60, deadline=None)
@given(world=st.integers(1, 7), rows_per_step=st.integers(1, 12), rows=st.integers(1, 4), position=st.integers(0, 200))
def test_ranks_together_see_what_one_alone_sees(
    chunks: Chunks, packing: Packing, world: int, rows_per_step: int, rows: int, position: int
) -> None:
    alone = Batches(chunks, packing, seed=3, rows_per_step=rows_per_step, rows=rows).step(position)
    ranks = [
        Batches(chunks, packing, seed=3, rows_per_step=rows_per_step, rows=rows, rank=r, world=world).step(position)
        for r in range(world)
    ]
    assert [s for step in ranks for m in step.micro_batches for s in spans(m)] == [
        s for m in alone.micro_batches for s in spans(m)
    ]
    assert len({len(step.micro_batches) for step in ranks}) == 1  # all take part in every exchange
    for step in ranks:
        assert (step.trained, step.tokens, step.next_position) == (alone.trained, alone.tokens, alone.next_position)


def test_an_epoch_predicts_every_token_once_in_an_order_of_its_own(chunks: Chunks, packing: Packing) -> None:
    batches = Batches(chunks, packing, seed=2, rows_per_step=5, rows=5, epochs=2)
    assert batches.steps == -(-2 * len(packing) // 5)
    orders = [batches.sequences(e * len(packing), (e + 1) * len(packing)).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(len(packing))) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    position = trained = steps = 0
    while position < 2 * len(packing):
        step = batches.step(position)
        position, trained, steps = step.next_position, trained + step.trained, steps + 1
    assert (position, steps, step.epoch) == (2 * len(packing), batches.steps, 2.0)
    marks = chunks.store.trained
    assert trained == 2 * int(marks.sum())
    with pytest.raises(ValueError, match="outside the run"):
        batches.step(position)


def test_a_resumed_run_goes_on_with_the_same_steps(chunks: Chunks, packing: Packing) -> None:
    first = Batches(chunks, packing, seed=2, rows_per_step=5, rows=2)
    position = 0
    for _ in range(30):
        step = first.step(position)
        again = Batches(chunks, packing, seed=2, rows_per_step=5, rows=2).step(position)
        assert [spans(m) for m in step.micro_batches] == [spans(m) for m in again.micro_batches]
        position = step.next_position
    other = Batches(chunks, packing, seed=9, rows_per_step=5, rows=2).step(0)
    assert [spans(m) for m in other.micro_batches] != [spans(m) for m in first.step(0).micro_batches]


def test_fractions_of_an_epoch(chunks: Chunks, packing: Packing) -> None:
    batches = Batches(chunks, packing, seed=2, rows_per_step=1, rows=1, epochs=0.5)
    assert batches.steps == -(-len(packing) // 2)
    assert Batches(chunks, packing, seed=2, rows_per_step=1, rows=1).steps is None
    with pytest.raises(ValueError, match="nothing to train on"):
        Batches(chunks, pack(np.empty(0, np.int32), 32, 0), seed=2, rows_per_step=1, rows=1)


def test_the_sources_of_a_step_are_those_of_its_documents(chunks: Chunks, packing: Packing) -> None:
    batches = Batches(chunks, packing, seed=2, rows_per_step=1, rows=1)
    found = [set(batches.sources(position)) for position in range(len(packing))]
    for position, names in enumerate(found):
        windows = packing.sequence(int(batches.sequences(position, position + 1)[0]))
        assert names == {chunks.metadata(int(w))["source_file"] for w in windows}
    assert {"a"} in found
    assert set(Batches(chunks, packing, seed=2, rows_per_step=99, rows=1).sources(0)) == {"a", "b"}


def test_order_stays_over_versions(chunks: Chunks) -> None:
    sixty_four = pack(np.full(64, 32), 32, 0)
    order = Batches(chunks, sixty_four, seed=42, rows_per_step=1, rows=1).sequences(62, 68)
    assert order.tolist() == [41, 43, 59, 6, 13, 53]
