"""Broken collections: strict stops with the place; skip goes on within a budget, and its ledger adds up."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core import Machine, Recipe, Registry
from nanovllm_core.contracts import Damage, Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.ledger import BROKEN, EMPTY, UNREADABLE, Counts, Skipped
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import open_or_build
from nanovllm_core.errors import DataError, RecipeError
from nanovllm_core.plan_data import plan_data
from nanovllm_core.slots import Slots


def documents_of(folder: Path, **data: object) -> Documents:
    recipe = Recipe.from_data({"data": {"path": str(folder), **data}})
    return plan_data(Slots(Registry.from_environment(), recipe), folder.parent / "out").documents


def walked(documents: Documents) -> tuple[list[str], list[Skipped]]:
    ledger: list[Skipped] = []
    return [d.text for d in documents.walk(None, ledger.append)], ledger


GOOD = {"json": '{"text": "good %d"}', "jsonl": '{"text": "good %d"}'}
BAD = [
    '{"text": NaN}',
    '{"a": "x", "a": "y"}',
    '{"text": "\\ud800"}',
    '{"text" "x"}',
    "[" * 65 + "]" * 65,
    "{'a': 1}",
    "nope",
]
BLANK = ['{"text": " "}']
OTHER = ["7", '{"id": 3}', "[1, 2]"]  # sound JSON without text
LINES = st.lists(
    st.just("good") | st.sampled_from(BAD) | st.sampled_from(BLANK) | st.sampled_from(OTHER), min_size=1, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(files=st.lists(st.tuples(st.sampled_from(["json", "jsonl", "jsonl.gz"]), LINES), min_size=1, max_size=4))
def test_documents_in_are_documents_out_and_skipped(tmp_path_factory, files: list[tuple[str, list[str]]]) -> None:
    folder = tmp_path_factory.mktemp("c") / "d"
    folder.mkdir()
    expected: list[str] = []
    skipped: Counter[str] = Counter()
    for number, (kind, lines) in enumerate(files):
        texts = []
        for i, line in enumerate(lines):
            text = f"good {number} {i}"
            texts.append(json.dumps({"text": text}) if line == "good" else line)
            if line == "good":
                expected.append(text)
            else:
                skipped[EMPTY if line in BLANK else BROKEN] += 1
        content = ("[" + ",\n".join(texts) + "]" if kind == "json" else "\n".join(texts)).encode()
        (folder / f"{number}.{kind}").write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    documents = documents_of(folder, on_error="skip", max_errors=1000)
    if not expected:
        with pytest.raises(DataError, match="no documents"):
            walked(documents)
        return
    found, ledger = walked(documents)
    assert found == expected
    assert documents.counts is not None
    assert documents.counts.skipped == skipped == Counter(s.kind for s in ledger)
    assert documents.counts.records == len(found) + len(ledger) == sum(len(lines) for _, lines in files)
    for one in ledger:  # and each has its place
        lines = files[int(one.source[0])][1]
        assert lines[one.index] != "good"
    strict = documents_of(folder)
    if skipped[BROKEN]:
        with pytest.raises(DataError, match=r"^\d\.json"):
            walked(strict)
    else:
        assert walked(strict)[0] == expected


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the file that root may not read is Linux's")
def test_files_that_cannot_be_read_to_the_end_are_one_entry(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"\xff\xff")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 5000)[:-20])
    (folder / "d.json").write_text('[{"text": "before"}, {"text": "unclosed}, {"text": "after"}]')
    (folder / "e.txt").symlink_to("/proc/self/mem")  # a file of no size that the system refuses to read
    documents = documents_of(folder, on_error="skip", max_errors=10)
    assert len(documents.fingerprint()) == 64
    found, ledger = walked(documents)
    assert found[0] == "good"
    assert found[-1] == "before"
    assert [(s.source, s.kind) for s in ledger] == [
        (f"{n}", UNREADABLE) for n in ("b.txt", "c.jsonl.gz", "d.json", "e.txt")
    ]
    assert "damaged or cut off" in ledger[1].reason
    assert documents.counts is not None
    assert documents.counts.records == len(found) + 4
    for name, says in (
        ("b.txt", "not valid utf-8"),
        ("c.jsonl.gz", "cut off"),
        ("d.json", "d.json:1:"),
        ("e.txt", "cannot be read"),
    ):
        for other in folder.iterdir():
            if other.name not in ("a.txt", name):
                other.rename(tmp_path / other.name)
        with pytest.raises(DataError, match=says):
            walked(documents_of(folder))
        for other in tmp_path.iterdir():
            if other != folder:
                other.rename(folder / other.name)


def test_the_budget_is_a_count_or_a_share(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "good"}\n' * 97 + "bad\n" * 3)
    for allowed in (3, 0.03, 0.5, 100):
        assert len(walked(documents_of(folder, on_error="skip", max_errors=allowed))[0]) == 97
    for refused in (1, 2, 0.029, 0.01):
        with pytest.raises(
            DataError, match=rf"a\.jsonl:9[89].*data.max_errors|max_errors allows {refused:g}; the first: a.jsonl:98"
        ):
            walked(documents_of(folder, on_error="skip", max_errors=refused))
    with pytest.raises(DataError, match=r"^a\.jsonl:98:1649: expecting value"):
        walked(documents_of(folder, max_errors=50))  # strict
    (folder / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    assert len(walked(documents_of(folder, on_error="skip"))[0]) == 1  # of few records too, one may be bad
    for wrong in (0, -1, 1.5):
        with pytest.raises(RecipeError, match="max_errors"):
            documents_of(folder, on_error="skip", max_errors=wrong)
    assert Counts(records=0).within(0)


def test_the_ledger_lies_in_the_store_and_adds_up(tmp_path: Path, letters) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "good"}\nbad\n{"text": ""}\n"better"\n')
    documents = documents_of(folder, on_error="skip")
    store = open_or_build(tmp_path / "tokens", "k" * 64, documents, letters())
    lines = [json.loads(line) for line in (store.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(one["source"], one["line"], one["index"], one["byte"], one["kind"]) for one in lines] == [
        ("a.jsonl", 2, 1, 17, BROKEN),
        ("a.jsonl", 3, 2, 21, EMPTY),
    ]
    assert lines[0]["reason"] == "expecting value"
    assert store.counts.records == len(store) + len(lines) == 4


def test_strangers_readers_may_raise_or_yield_damage() -> None:
    class Raising:
        def read(self, source):
            yield Record(value="one", source=source.name)
            raise DataError("the rest is gone")

    class Yielding:
        def read(self, source):
            yield Damage(source=source.name, reason="lost", index=0)
            yield Record(value="two", source=source.name, index=1)

    def documents(reader: object, allow: int) -> Documents:
        found = Sources(path="m", sources=(Source(path="x", name="x"),))
        return Documents(
            found, lambda s: reader, lambda r: Document(segments=(Segment(r.value),), source=r.source), allow
        )

    for reader, text, kind in ((Raising(), "one", UNREADABLE), (Yielding(), "two", BROKEN)):
        allowing = documents(reader, 1)
        assert [d.text for d in allowing] == [text]
        assert allowing.counts is not None
        assert allowing.counts.skipped == {kind: 1}
    with pytest.raises(DataError, match=r"^the rest is gone$"):
        list(documents(Raising(), 0))
    with pytest.raises(DataError, match=r"^x\[0\]: lost$"):
        list(documents(Yielding(), 0))


def test_a_text_in_parts_that_breaks_off_is_never_skipped() -> None:
    class Broken:
        def read(self, source):
            yield Record(value="given out already", source=source.name, continues=True)
            yield Damage(source=source.name, reason="lost", last=True)

    found = Sources(path="m", sources=(Source(path="x", name="x"),))
    documents = Documents(
        found, lambda s: Broken(), lambda r: Document(segments=(Segment(r.value),), source=r.source), 9
    )
    with pytest.raises(DataError, match=r"lost \(inside one text in parts"):
        list(documents)


@pytest.mark.parametrize("blank", [3, 1])
def test_blank_parts_belong_to_their_text(blank: int) -> None:
    parts = [" \n"] * blank + ["text", " "] * (blank == 1)

    class Parts:
        def read(self, source):
            return (Record(value=p, source=source.name, continues=i < len(parts) - 1) for i, p in enumerate(parts))

    found = Sources(path="m", sources=(Source(path="x", name="x"),))
    documents = Documents(found, lambda s: Parts(), lambda r: Document(segments=(Segment(r.value),), source=r.source))
    if blank == 3:
        with pytest.raises(DataError, match="1 records skipped: empty"):
            list(documents)
    else:
        assert "".join(d.text for d in documents) == "".join(parts)
        assert documents.counts == Counts(records=1, documents=1, characters=7, bytes=7)


def test_a_strict_run_does_not_take_a_lenient_one_at_its_word(tmp_path: Path) -> None:
    from nanovllm_core import make_plan, run

    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "some good text"}\n' * 30 + "bad\n")
    recipe = {
        "data": {"path": str(folder), "on_error": "skip", "max_seq_length": 32, "eval_fraction": 0},
        "model": {"use": "preset", "size": "tiny"},
        "tokenizer": {"use": "bpe", "size": 300},
        "train": {"max_steps": 1},
        "callbacks": [],
        "output_dir": str(tmp_path / "out"),
    }

    def go(recipe: dict[str, object]) -> None:
        run(make_plan(Recipe.from_data(recipe), Registry.from_environment(), Machine.detect()))

    go(recipe)
    [line] = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 31
    strict = {**recipe, "data": {**recipe["data"], "on_error": "strict"}}
    with pytest.raises(DataError, match=r"^a\.jsonl:31:"):
        go(strict)
