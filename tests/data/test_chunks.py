"""Windows: every token covered, overlaps as asked, an end for every overlap; and the tokens they read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.contracts import IGNORE
from nanovllm_core.data.chunks import Chunks, windows
from nanovllm_core.data.split import held_out, kept
from nanovllm_core.data.store import open_or_build


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    length = draw(st.integers(1, 40))
    return length, draw(st.integers(0, length - 1)), draw(st.integers(1, 60))


@settings(max_examples=500, deadline=None)
@given(lengths=st.lists(st.integers(0, 200), max_size=6), cut=cuts())
def test_windows(lengths: list[int], cut: tuple[int, int, int]) -> None:
    length, overlap, minimum = cut
    found = windows(np.array(lengths, np.int64), length, overlap, minimum)
    for unit, size in enumerate(lengths):
        mine = [i for i in range(len(found)) if found.unit[i] == unit]
        spans = [(int(found.start[i]), int(found.start[i] + found.length[i])) for i in mine]
        assert {p for a, b in spans for p in range(a, b)} == set(range(size))  # every position, nothing else
        fresh = [p for i in mine for p in range(found.start[i] + found.context[i], found.start[i] + found.length[i])]
        assert fresh == list(range(size))  # trained once, in order
        if size <= length:
            assert spans == [(0, size)] * (size > 0)  # short texts stay whole
            continue
        assert all(b - a == length for a, b in spans[:-1])
        for n, ((a, b), (c, d)) in enumerate(pairwise(spans), 2):
            if n == len(spans) and size - (b - overlap) < minimum:  # a tail: moved back to full length
                assert (c, d) == (size - length, size)
            else:
                assert b - c == overlap
            assert a < c
            assert b < d
        assert spans[-1][1] == size
        assert spans[-1][1] - spans[-1][0] >= min(minimum, length)
        assert len(spans) == -(-(size - length) // (length - overlap)) + 1  # no window too many


def test_a_tail_joins_its_predecessor() -> None:
    found = windows(np.array([25]), 10, 2, 5)  # 0-10, 8-18, 16-25
    assert [(int(s), int(n), int(c)) for s, n, c in zip(found.start, found.length, found.context, strict=True)] == [
        (0, 10, 0),
        (8, 10, 2),
        (16, 9, 2),
    ]
    found = windows(np.array([19]), 10, 2, 5)  # the last would be 16-19: moved to 9-19
    assert (int(found.start[-1]), int(found.length[-1]), int(found.context[-1])) == (9, 10, 9)
    with pytest.raises(ValueError, match="below the length"):
        windows(np.array([5]), 4, 4, 1)


def test_two_million_short_documents_are_cut_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2_000_000)
    found = windows(lengths, 32, 8, 4)
    assert int((found.length - found.context).sum()) == int(lengths.sum())


def built(tmp_path: Path, memory, letters, texts: list[object]):
    documents = memory({f"f{i}.txt": [t] for i, t in enumerate(texts)})
    return open_or_build(tmp_path, "k" * 64, documents, letters())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    cut=cuts(),
    joined=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_token_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory,
    memory,
    letters,
    sizes: list[int],
    cut: tuple[int, int, int],
    joined: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdef ghij"), n)) + "." for n in sizes]
    store = built(tmp_path_factory.mktemp("s"), memory, letters, texts)
    out = held_out(store.contents, 0.3, seed)
    length, overlap, minimum = cut
    separator = [70, 71, 72] if joined else None
    for numbers in (kept(len(texts), out), out):
        chunks = Chunks(store, numbers, length=length, overlap=overlap, minimum=minimum, separator=separator)
        predicted: list[int] = []
        for i in range(len(chunks)):
            tokens, targets = chunks.read(i)
            assert len(tokens) == len(targets) == chunks.lengths[i] <= length
            assert chunks.trained(i) == np.count_nonzero(targets != IGNORE)
            shown = targets[:-1][targets[:-1] != IGNORE]
            assert np.array_equal(shown, tokens[1:][targets[:-1] != IGNORE])  # the next token, indeed
            predicted += targets[targets != IGNORE].tolist()
        expected = [t for n in numbers for t in [*letters().encode([texts[n]])[0], 1]]
        assert predicted == expected
        assert chunks.text_bytes == sum(len(texts[n]) for n in numbers)


def test_metadata(tmp_path: Path, memory, letters) -> None:
    store = built(tmp_path, memory, letters, ["a" * 20, "b" * 3, "c" * 4])
    separate = Chunks(store, np.arange(3), length=8, overlap=2, minimum=1)
    assert [separate.metadata(i) for i in range(len(separate))][-2:] == [
        {"source_file": "f1.txt", "source_files": ["f1.txt"], "chunk_index": 0, "token_count": 4},
        {"source_file": "f2.txt", "source_files": ["f2.txt"], "chunk_index": 0, "token_count": 5},
    ]
    assert [separate.metadata(i)["chunk_index"] for i in range(4)] == [0, 1, 2, 3]
    joined = Chunks(store, np.arange(3), length=16, overlap=0, minimum=1, separator=[70])
    assert [joined.metadata(i) for i in range(len(joined))] == [
        {"source_file": "f0.txt", "source_files": ["f0.txt"], "chunk_index": 0, "token_count": 16},
        {"source_file": "f0.txt", "source_files": ["f0.txt", "f1.txt", "f2.txt"], "chunk_index": 1, "token_count": 16},
        {"source_file": "f2.txt", "source_files": ["f2.txt"], "chunk_index": 2, "token_count": 2},
    ]
    assert joined.read(0)[0].tolist() == store.ids(0)[:16].tolist()
    stream = [*store.ids(0), 70, *store.ids(1), 70, *store.ids(2)]
    assert [t for i in range(3) for t in joined.read(i)[0]] == stream[:-1]


def test_an_overlap_is_trained_once_unless_asked(tmp_path: Path, memory, letters) -> None:
    store = built(tmp_path, memory, letters, ["abcdefghijklmnopqrst"])  # 21 positions: 0-8, 5-13, 10-18, 13-21
    once = Chunks(store, np.arange(1), length=8, overlap=3, minimum=7)
    often = Chunks(store, np.arange(1), length=8, overlap=3, minimum=7, train_on_overlap=True)
    assert [once.trained(i) for i in range(len(once))] == [8, 5, 5, 3]
    assert [often.trained(i) for i in range(len(often))] == [8, 8, 8, 8]
    for i in range(len(once)):
        assert np.array_equal(once.read(i)[0], often.read(i)[0])
        assert often.read(i)[1].tolist() == [*often.read(i)[0][1:].tolist(), often.read(i)[1][-1]]
    assert once.text_bytes == often.text_bytes == 20
