"""Broken collections: strict stops with the place; skip goes on within a budget, and its ledger adds up."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zstandard import ZstdCompressor

from nanovllm_core import Machine, Recipe, Registry
from nanovllm_core.contracts import Damage, Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.ledger import BROKEN, EMPTY, UNREADABLE, Counts, Skipped
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import known, open_or_build
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
        assert one.source not in one.reason, "the place has fields of its own"
        assert "byte" not in one.reason
        assert one.bytes_lost is None
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
    assert ledger[1].reason.startswith("the compressed data is damaged or cut off near byte")
    assert not any(s.source in s.reason for s in ledger)
    assert [s.bytes_lost for s in ledger] == [2, None, 39, 0]  # of a compressed file nobody can tell
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
    with pytest.raises(DataError, match=r"^a\.jsonl:98:1649: expecting a value, found 'bad'$"):
        walked(documents_of(folder, max_errors=50))  # strict
    (folder / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    assert len(walked(documents_of(folder, on_error="skip"))[0]) == 1  # of few records too, one may be bad
    for wrong in (0, -1, 1.5):
        with pytest.raises(RecipeError, match="max_errors"):
            documents_of(folder, on_error="skip", max_errors=wrong)
    assert Counts(records=0).within(0)


GOOD_ROWS = ",\n".join(f'{{"text": "good {i}"}}' for i in range(50))
RESTS = {  # a file of which the rest is lost -> where that begins
    "a missing comma": ("a.json", f"[{GOOD_ROWS} {GOOD_ROWS}]", len(f"[{GOOD_ROWS} ")),
    "a stray comment": ("a.json", f"[{GOOD_ROWS} // more\n, {GOOD_ROWS}]", len(f"[{GOOD_ROWS} ")),
    "JSON Lines named .json": ("a.json", '{"text": "ö"}\n{"text": "b"}\n', 15),
    "a string without an end": (
        "a.json",
        f'[{GOOD_ROWS}, {{"text": "a}}, {GOOD_ROWS.replace(chr(34), "")}]',
        len(GOOD_ROWS) + 3,
    ),
    "one record that is broken at its end": ("a.json", '{"a": ' + "[1]," * 99 + "}", 0),
}


@pytest.mark.parametrize("kind", RESTS)
def test_the_rest_of_a_file_counts_in_bytes(tmp_path: Path, kind: str) -> None:
    name, text, begins = RESTS[kind]
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / name).write_text(text, "utf-8")
    (folder / "b.jsonl").write_text('{"text": "good"}\n' * 999)
    size = (folder / name).stat().st_size
    total, lost = size + 999 * 17, size - begins
    for allowed in (1, 7, lost / total + 1e-9, 0.9):
        documents = documents_of(folder, on_error="skip", max_errors=allowed)
        found, [line] = walked(documents)
        assert (line.kind, line.bytes_lost, line.source) == (UNREADABLE, lost, name)
        counts = documents.counts
        assert counts is not None
        assert (counts.records, counts.lost, counts.size, counts.rests) == (len(found) + 1, lost, total, 1)
        assert counts.loss == f"{lost:,} of {total:,} bytes"
    for refused in (lost / total - 1e-9, 0.0001):
        with pytest.raises(
            DataError, match=rf"{lost:,} of {total:,} bytes cannot .*max_errors.*; the first: {name}:\d"
        ):
            walked(documents_of(folder, on_error="skip", max_errors=refused))


def test_one_record_may_always_be_lost_but_no_unknown_number(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text("good text")
    (folder / "9.txt").write_bytes(b"\xff bad text")
    assert len(walked(documents_of(folder, on_error="skip"))[0]) == 9
    (folder / "9.txt").rename(folder / "9.json")
    with pytest.raises(DataError, match=r"10 of 91 bytes cannot be read, and data\.max_errors allows a share of 0\.01"):
        walked(documents_of(folder, on_error="skip"))
    (folder / "9.json").rename(folder / "9.txt")
    (folder / "8.txt").write_bytes(b"\xff bad text")
    with pytest.raises(DataError, match=r"2 of 10 records or files \(20 of 92 bytes\) cannot be read"):
        walked(documents_of(folder, on_error="skip"))
    with pytest.raises(
        DataError, match=r"^[^:]*: 20 of 92 bytes cannot be read"
    ):  # 22 % of the bytes, 20 % of the records
        walked(documents_of(folder, on_error="skip", max_errors=0.21))


EMPTY_FILES = ("a.txt", "b.json", "c.jsonl", "d.ndjson", "e.txt.gz", "f.json.gz", "g.jsonl.zst", "h.json", "i.jsonl")


def test_empty_files_of_every_kind_are_counted_and_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in EMPTY_FILES:
        (folder / name).write_bytes(b"[ ]" if name == "h.json" else b" \n" * (name == "i.jsonl"))
    with pytest.raises(DataError, match=r"no documents; found: 9 records skipped: empty$"):
        walked(documents_of(folder))
    (folder / "z.txt").write_text("text")
    documents = documents_of(folder)
    found, ledger = walked(documents)
    assert found == ["text"]
    assert [(s.source, s.kind, s.index, s.byte) for s in ledger] == [(name, EMPTY, 0, 0) for name in EMPTY_FILES]
    assert documents.counts is not None
    assert (documents.counts.records, documents.counts.damaged) == (10, 0)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no documents; found: nothing at all"):
        walked(documents_of(folder))


@pytest.mark.parametrize("pack", [gzip.compress, ZstdCompressor().compress], ids=["gz", "zst"])
def test_of_a_compressed_file_nobody_can_tell_how_much_is_lost(tmp_path: Path, pack) -> None:
    folder, suffix = tmp_path / "d", ".gz" if pack is gzip.compress else ".zst"
    folder.mkdir()
    (folder / "a.txt").write_text("good text" * 1000)
    rows = "".join(json.dumps({"text": f"{i:x}" * 9}) + "\n" for i in range(9000))
    packed = folder / f"b.jsonl{suffix}"
    packed.write_bytes(pack(rows.encode())[:-30])
    size = packed.stat().st_size
    documents = documents_of(folder, on_error="skip", max_errors=1)
    found, [line] = walked(documents)
    assert (line.kind, line.bytes_lost, line.line) == (UNREADABLE, None, None)
    assert 0 < line.byte <= len(rows)
    assert rows[: line.byte].count("\n") == line.index == len(found) - 1, "the content up to there was read"
    counts = documents.counts
    assert counts is not None
    assert (counts.lost, counts.packed, counts.size) == (0, size, size + 9000)
    assert counts.loss == f"an unknown part of {size:,} compressed bytes"
    with pytest.raises(DataError, match=rf"unknown part of {size:,} .* counts whole, since nobody can tell"):
        walked(documents_of(folder, on_error="skip", max_errors=size / (size + 9000) - 1e-9))
    walked(documents_of(folder, on_error="skip", max_errors=size / (size + 9000) + 1e-9))
    packed.unlink()
    (folder / f"b.json{suffix}").write_bytes(pack(b"[" + b"1, " * 9999 + b"2 3]"))  # and of what does unpack
    documents = documents_of(folder, on_error="skip", max_errors=10_001)
    *_, line = walked(documents)[1]
    assert (line.index, line.byte, line.bytes_lost) == (10_000, 1 + 3 * 9999 + 2, None)
    assert documents.counts is not None
    assert documents.counts.packed == (folder / f"b.json{suffix}").stat().st_size


@pytest.mark.parametrize(
    ("said", "reason", "place"),
    [
        ("x:5:100: bad", "bad", (5, 100)),
        ("x:5: bad", "bad", (5, 7)),
        ("x[3]: bad", "bad", (None, 7)),
        ("x[3] (byte 100): bad", "bad", (None, 100)),
        ("x: bad", "bad", (None, 7)),
        ("x is bad: why", "x is bad: why", (None, 7)),
        ("xyz:5: bad", "xyz:5: bad", (None, 7)),
        ("bad", "bad", (None, 7)),
    ],
)
def test_a_reason_does_not_repeat_the_place(said: str, reason: str, place: tuple[int | None, int]) -> None:
    class Raising:
        def read(self, source):
            yield Record(value="one", source=source.name, byte=7)
            raise DataError(said)

    source = Source(path="x", name="x", size=1000)
    documents = Documents(
        Sources(path="m", sources=(source,)),
        lambda s: Raising(),
        lambda r: Document(segments=(Segment(r.value),), source=r.source),
        1,
    )
    _, [line] = walked(documents)
    assert (line.reason, (line.line, line.byte), line.index, line.bytes_lost) == (reason, place, 1, 993)


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
    assert lines[0]["reason"] == "expecting a value, found 'bad'"
    assert store.counts.records == len(store) + len(lines) == 4


def test_what_is_lost_is_remembered_with_the_tokens(tmp_path: Path, letters) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.json").write_text('["good", "good" "lost"]')
    documents = documents_of(folder, on_error="skip", max_errors=1)
    store = open_or_build(tmp_path / "tokens", "k" * 64, documents, letters())
    [line] = map(json.loads, (store.folder / "skipped.jsonl").read_text().splitlines())
    assert (line["byte"], line["bytes_lost"]) == (16, 7)
    remembered = known(tmp_path / "tokens", "k" * 64)
    assert remembered is not None
    assert remembered[0] == store.counts == documents.counts
    assert (remembered[0].lost, remembered[0].size) == (7, 23)
    assert [remembered[0].within(allow) for allow in (0, 0.3, 0.31, 1)] == [False, False, True, True]


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
