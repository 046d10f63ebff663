"""Held-out micro-batches: every window once, each in a micro-batch of its own source; a table that stays short."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.held_out import ROWS, HeldOut
from nanovllm_core.data.store import Store, open_or_build


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, memory, letters) -> Store:
    rng = np.random.default_rng(6)
    text = lambda: "".join(rng.choice(list("abcdefgh"), int(rng.integers(1, 90))))  # noqa: E731
    values = {f"{n}.txt": [text() for _ in range(int(rng.integers(1, 4)))] for n in range(ROWS + 30)}
    return open_or_build(tmp_path_factory.mktemp("t"), "h" * 64, memory(values), letters())


def chunks_of(store: Store, numbers: np.ndarray, separator: list[int] | None = None) -> Chunks:
    return Chunks(store, numbers, length=32, overlap=6, minimum=8, separator=separator)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("count", [7, 200])
def test_every_window_once_and_with_its_source(store: Store, world: int, count: int) -> None:
    numbers = np.arange(0, len(store), max(1, len(store) // count))
    chunks = chunks_of(store, numbers)
    held = HeldOut(chunks, capacity=32, rows=3)
    ranks = [list(held.batches(rank=r, world=world)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    seen = []
    for rank in ranks:
        for row, micro in rank:
            assert sum(micro.batch.lengths) <= 96
            for a, b in pairwise(np.cumsum([0, *micro.batch.lengths])):
                if micro.trained:
                    seen.append((held.table[row].source, micro.tokens[a:b].tolist(), micro.targets[a:b].tolist()))
    own = {row.source for row in held.table}
    want = []
    for w in range(len(chunks)):
        source = chunks.metadata(w)["source_file"]
        tokens, targets = chunks.read(w)
        want.append((source if source in own else held.table[-1].source, tokens.tolist(), targets.tolist()))
    assert sorted(seen) == sorted(want)
    assert sum(m.trained for r in ranks for _, m in r) == sum(chunks.trained(w) for w in range(len(chunks)))


def test_the_table_has_the_largest_sources_and_one_row_for_the_rest(store: Store) -> None:
    chunks = chunks_of(store, np.arange(len(store)))
    table = HeldOut(chunks, capacity=32, rows=2).table
    assert len(table) == ROWS
    assert table[-1].source == "(31 other sources)"
    sizes = [row.text_bytes for row in table[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(row.text_bytes for row in table) == chunks.text_bytes
    few = HeldOut(chunks_of(store, np.arange(5)), capacity=32, rows=2).table
    assert {row.source for row in few} == {store.source(n) for n in range(5)}


def test_joined_documents_are_one_row(store: Store) -> None:
    chunks = chunks_of(store, np.arange(20), separator=[9, 9])
    held = HeldOut(chunks, capacity=32, rows=2)
    assert [row.text_bytes for row in held.table] == [chunks.text_bytes]
    assert sum(m.trained for _, m in held.batches()) == sum(chunks.trained(w) for w in range(len(chunks)))
