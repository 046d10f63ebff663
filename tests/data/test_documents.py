"""Documents in = documents out + skipped; the held-out split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.split import held_out, kept
from nanovllm_core.errors import BrokenComponent, DataError


def document_of(record: Record) -> Document:
    return Document(segments=(Segment(record.value),), source=record.source)


def test_every_record_is_accounted_for(memory) -> None:
    documents = memory({"a": ["one", "", " \n"], "b": [], "x.bin": ["?"], "c": [("Q", "é"), ("Q", " ")], "y.bin": []})
    for _ in range(2):  # a walk can be repeated
        assert [d.text for d in documents] == ["one", "Q\né"]
        counts = documents.counts
        assert (counts.records, counts.documents, counts.characters, counts.bytes) == (6, 2, 5, 6)
        assert counts.skipped == {"empty": 3, "no text to train on": 1}  # "b" holds nothing: one, as an empty text is
        assert counts.records == counts.documents + sum(counts.skipped.values())
    assert documents.unknown == {".bin": 2}
    assert documents.files == 3
    assert documents.count().documents == 2
    assert list(documents.texts(lambda n: n == 0)) == ["Q\né"]


def test_progress_ends_at_the_whole(memory) -> None:
    told: list[tuple[int, int]] = []
    documents = memory({"a": ["x"], "b": ["y"], "z.bin": []})
    assert documents.count(lambda done, total: told.append((done, total))).documents == 2
    assert told[-1] == (200, 200) == (documents.bytes, documents.bytes)


def test_progress_says_once_that_a_walk_is_over() -> None:
    files = [("a", 3 << 20), ("empty", 0), ("b", 1 << 20), ("c", 0), ("d", 0)]
    found = tuple(Source(path=name, name=name, size=size) for name, size in files)

    class Reader:
        def read(self, source):
            ends = range(0, source.size + 1, 1 << 19) if source.size else ()  # the last byte is past the end
            return (Record(value="x", source=source.name, byte=byte) for byte in ends)

    documents = Documents(Sources(path="mem", sources=found), lambda s: Reader(), document_of)
    told: list[tuple[int, int]] = []
    documents.count(lambda done, total: told.append((done, total)))
    assert [done >> 20 for done, _ in told] == [0, 1, 2, 3, 4]
    assert told[-1] == (4 << 20, 4 << 20)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "a.x: its reader's `read` gave None, not an iterator of Record"),
        (7, "a.x: its reader's `read` gave a value of type int"),
        ([Record(value="x", source="a.x"), "text"], r"a.x\[1\]: its reader gave a value of type str, not a Record"),
        ([None], r"a.x\[0\]: its reader gave None"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_reader_that_gives_no_records_is_named_by_its_source(given: object, says: str, exists: bool) -> None:
    class Reader:
        def read(self, source):
            return given

    found = Sources(path="a.x", sources=(Source(path="a.x", name="a.x", exists=exists),))
    documents = Documents(found, lambda s: Reader(), document_of)
    with pytest.raises(BrokenComponent, match=f"^{says}"):
        documents.count()
    if not exists:
        with pytest.raises(BrokenComponent, match=f"^{says}"):
            documents.fingerprint()


def test_an_extractor_that_gives_no_document_is_told_what_it_gave() -> None:
    class Reader:
        def read(self, source):
            return iter([Record(value="x", source="a.x", line=3)])

    found = Sources(path="a.x", sources=(Source(path="a.x", name="a.x"),))
    with pytest.raises(
        BrokenComponent, match=r"^a.x:3: the first of data\.extractors to answer gave a value of type str"
    ):
        Documents(found, lambda s: Reader(), lambda record: record.value).count()


def test_no_documents_is_an_error_that_says_what_was_found(memory) -> None:
    with pytest.raises(DataError, match=r"^mem: no documents; found: .* 2 \.bin; 1 records skipped: empty"):
        list(memory({"a": [""], "x.bin": [], "y.bin": []}))
    with pytest.raises(DataError, match="no documents; found: 1 records skipped: empty"):
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
        class Reader:
            def read(self, source):
                return (Record(value=v, source=source.name) for v in values)

        found = Sources(path="db", sources=(Source(path="db", name="db", exists=False),))
        return Documents(found, lambda s: Reader(), lambda r: None).fingerprint()

    assert of([{"a": 1, "b": 2}]) == of([{"b": 2, "a": 1}]) != of([{"a": 1}, {"b": 2}])


@settings(max_examples=200, deadline=None)
@given(count=st.integers(0, 400), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**32))
def test_held_out(count: int, fraction: float, seed: int) -> None:
    contents = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    out = held_out(contents, fraction, seed)
    rest = kept(count, out)
    assert sorted([*out, *rest]) == list(range(count))
    assert np.all(np.diff(out) > 0)
    assert np.array_equal(out, held_out(contents, fraction, seed))
    if count < 2 or fraction == 0:
        assert len(out) == 0
    else:
        assert 1 <= len(out) < count
        assert abs(len(out) - count * fraction) <= 1


def test_held_out_differs_by_seed_and_stays_over_versions() -> None:
    contents = np.arange(1000, dtype=np.uint64)
    assert held_out(contents, 0.01, 1).tolist() != held_out(contents, 0.01, 2).tolist()
    assert held_out(contents[:20], 0.2, 42).tolist() == [1, 4, 13, 14]


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 12), max_size=60),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_copies_never_straddle_and_order_does_not_matter(
    kinds: list[int], fraction: float, seed: int, data: st.DataObject
) -> None:
    contents = np.array(kinds, np.uint64)
    out = held_out(contents, fraction, seed)
    rest = kept(len(kinds), out)
    assert not set(contents[out].tolist()) & set(contents[rest].tolist())
    if len(set(kinds)) > 1 and fraction:
        assert 0 < len(out) < len(kinds)
    shuffled = np.array(data.draw(st.permutations(kinds)), np.uint64)
    assert set(shuffled[held_out(shuffled, fraction, seed)].tolist()) == set(contents[out].tolist())
