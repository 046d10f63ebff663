"""Documents in = documents out + skipped; the held-out split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.contracts import Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.split import held_out, kept
from nanovllm_core.errors import DataError


def test_every_record_is_accounted_for(memory) -> None:
    documents = memory({"a": ["one", "", " \n"], "b": [], "x.bin": ["?"], "c": [("Q", "é"), ("Q", " ")], "y.bin": []})
    for _ in range(2):  # a walk can be repeated
        assert [d.text for d in documents] == ["one", "Q\né"]
        counts = documents.counts
        assert (counts.records, counts.documents, counts.characters, counts.bytes) == (5, 2, 5, 6)
        assert counts.skipped == {"empty": 2, "no text to train on": 1}
        assert counts.records == counts.documents + sum(counts.skipped.values())
    assert documents.unknown == {".bin": 2}
    assert documents.files == 3
    assert documents.count().documents == 2
    assert list(documents.texts({0})) == ["Q\né"]


def test_progress_ends_at_the_whole(memory) -> None:
    told: list[tuple[int, int]] = []
    documents = memory({"a": ["x"], "b": ["y"], "z.bin": []})
    assert documents.count(lambda done, total: told.append((done, total))).documents == 2
    assert told[-1] == (200, 200) == (documents.bytes, documents.bytes)


def test_no_documents_is_an_error_that_says_what_was_found(memory) -> None:
    with pytest.raises(DataError, match=r"^mem: no documents; found: .* 2 \.bin; 1 records skipped: empty"):
        list(memory({"a": [""], "x.bin": [], "y.bin": []}))
    with pytest.raises(DataError, match="1 readable files without a record"):
        list(memory({"a": []}))
    with pytest.raises(DataError, match="nothing at all"):
        list(memory({}))


def test_what_nobody_takes(memory) -> None:
    with pytest.raises(DataError, match=r"a\[1\]: none of data\.extractors"):
        list(memory({"a": ["x", None]}))
    missing = Sources(path="no/such", sources=(Source(path="no/such", name="no/such", exists=False),))
    with pytest.raises(DataError, match=r"'no/such' is neither a file nor a folder"):
        Documents(missing, lambda s: None, lambda r: None)
    with pytest.raises(DataError, match=r"a\[0\]: half of a surrogate pair"):
        list(memory({"a": ["x\ud800"]}))


def test_fingerprint_of_what_is_no_file_comes_from_its_records() -> None:
    def of(values: list[object]) -> str:
        from nanovllm_core.contracts import Record

        class Reader:
            def read(self, source):
                return (Record(value=v, source=source.name) for v in values)

        found = Sources(path="db", sources=(Source(path="db", name="db", exists=False),))
        return Documents(found, lambda s: Reader(), lambda r: None).fingerprint()

    assert of([{"a": 1, "b": 2}]) == of([{"b": 2, "a": 1}]) != of([{"a": 1}, {"b": 2}])


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 400), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_held_out(count: int, fraction: float, seed: int) -> None:
    out = held_out(count, fraction, seed)
    rest = kept(count, out)
    assert sorted([*out, *rest]) == list(range(count))
    assert np.all(np.diff(out) > 0)
    assert np.array_equal(out, held_out(count, fraction, seed))
    if count < 2 or fraction == 0:
        assert len(out) == 0
    else:
        assert 1 <= len(out) < count
        assert abs(len(out) - count * fraction) <= 1


def test_held_out_differs_by_seed_and_stays_over_versions() -> None:
    assert held_out(1000, 0.01, 1).tolist() != held_out(1000, 0.01, 2).tolist()
    assert held_out(20, 0.2, 42).tolist() == [4, 8, 15, 17]
