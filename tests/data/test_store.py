"""The token store: what it holds, found again, never half-built, and memory that does not follow the corpus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data import building as building_module
from nanovllm_core.data import encode as encode_module
from nanovllm_core.data import store as store_module
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import Store, known, open_or_build, store_key
from nanovllm_core.errors import DataError, OutputError

VALUES = {"a.jsonl": ["one", "", "two two"], "b.txt": [("Question", "Answer")], "c.txt": ["drei"]}
KEY = "0123456789abcdef" * 4


def contents(store: Store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(store.folder.iterdir())}


def test_what_it_holds(tmp_path: Path, memory, letters) -> None:
    tokenizer = letters()
    store = open_or_build(tmp_path / "tokens", KEY, memory(VALUES), tokenizer)
    assert len(store) == 4
    assert [tokenizer.decode(store.ids(i).tolist()) for i in range(4)] == ["one", "two two", "Question\nAnswer", "drei"]
    assert all(store.ids(i)[0] == 0 and store.ids(i)[-1] == 1 for i in range(4))
    assert store.marks(2).tolist() == [0] * 10 + [1] * 7
    assert [store.source(i) for i in range(4)] == ["a.jsonl", "a.jsonl", "b.txt", "c.txt"]
    assert store.documents["record"].tolist() == [0, 2, 0, 0]
    assert store.documents["bytes"].tolist() == [3, 7, 6, 4]
    assert store.tokens.dtype == np.uint16
    assert store.counts.skipped == {"empty": 1}
    assert store.counts.documents == 4
    assert not [p for p in store.folder.parent.iterdir() if p != store.folder]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_large_vocabularies_take_four_bytes(tmp_path: Path, memory, letters) -> None:
    values = {"a": ["x\U0001f600"]}
    assert open_or_build(tmp_path, KEY, memory(values), letters(vocab_size=1 << 21)).ids(0).tolist() == [
        0,
        124,
        128516,
        1,
    ]
    with pytest.raises(DataError, match=r"a\[0\]: the tokenizer gave id 128516"):
        open_or_build(tmp_path, "x" * 64, memory(values), letters())
    assert len(list(tmp_path.iterdir())) == 1


def test_found_again_without_reading_and_equal_when_rebuilt(tmp_path: Path, memory, letters) -> None:
    first = open_or_build(tmp_path / "1", KEY, memory(VALUES), letters())
    tokenizer = letters()
    again = open_or_build(tmp_path / "1", KEY, memory({}), tokenizer)
    assert tokenizer.calls == []
    assert contents(again) == contents(first)
    rebuilt = open_or_build(tmp_path / "2", KEY, memory(VALUES), letters())
    assert contents(rebuilt) == contents(first)


def test_batches_do_not_change_it(tmp_path: Path, memory, letters, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_or_build(tmp_path / "1", KEY, memory(VALUES), letters())
    monkeypatch.setattr(building_module, "BATCH", 1)
    assert contents(open_or_build(tmp_path / "2", KEY, memory(VALUES), letters())) == contents(first)


def test_key_depends_on_documents_and_tokenizer(letters) -> None:
    keys = [
        store_key("data", letters()),
        store_key("data", letters()),
        store_key("other", letters()),
        store_key("data", letters(prefix=False)),
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_one_store_is_kept_and_remembers_its_counts(tmp_path: Path, memory, letters) -> None:
    open_or_build(tmp_path, "1" * 64, memory(VALUES), letters())
    second = open_or_build(tmp_path, "2" * 64, memory(VALUES), letters())
    assert list(tmp_path.iterdir()) == [second.folder]
    counts, contents = known(tmp_path, "2" * 64)
    assert counts == second.counts
    assert contents.tolist() == second.contents.tolist()
    assert known(tmp_path, "1" * 64) is None
    (second.folder / "meta.json").write_text("{")
    assert known(tmp_path, "2" * 64) is None


@pytest.mark.parametrize("name", [*building_module.FILES, "meta.json"])
def test_a_damaged_store_is_built_anew(name: str, tmp_path: Path, memory, letters) -> None:
    store = open_or_build(tmp_path, KEY, memory(VALUES), letters())
    whole = contents(store)
    (store.folder / name).write_bytes(whole[name][:-1])
    assert Store.open(store.folder, KEY) is None
    assert contents(open_or_build(tmp_path, KEY, memory(VALUES), letters())) == whole
    assert Store.open(store.folder, "other") is None


def test_bad_input_leaves_nothing(tmp_path: Path, memory, letters) -> None:
    with pytest.raises(DataError, match="no documents"):
        open_or_build(tmp_path, KEY, memory({"a": [""]}), letters())
    with pytest.raises(DataError, match=r"b\[0\]"):
        open_or_build(tmp_path, KEY, memory({"a": ["x" * 3_000_000], "b": [None]}), letters())
    assert list(tmp_path.iterdir()) == []


def test_unusable_folder(tmp_path: Path, memory, letters) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        open_or_build(tmp_path / "file" / "tokens", KEY, memory(VALUES), letters())


def test_unfinished_stores_of_dead_processes_are_removed(tmp_path: Path, memory, letters) -> None:
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(b"x")
    past = time.time() - 2 * store_module.STALE
    os.utime(old / "tokens.bin", (past, past))
    os.utime(old, (past, past))
    open_or_build(tmp_path, KEY, memory(VALUES), letters())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".building-new", store_key(KEY, letters())[:32]]


SCRIPT = """
import sys
sys.path[:] = {path!r}
import resource
from pathlib import Path
from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data import building
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import open_or_build
from nanovllm_tokenizers.bpe import train

class Made:
    def read(self, source):
        for i in range({count}):
            long = i % 500 == 7
            for part in range(3 if long else 1):
                value = f"text number {{i}} " * (400 if long else 40)
                yield Record(value=value, source=source.name, index=i, continues=long and part < 2)

building.BATCH, building.SAVE = {batch}, 3 * {batch}
documents = Documents(
    Sources(path="s", sources=[Source(path="s", name="s", size=1), Source(path="t", name="t", size=1)]), lambda s: Made(),
    lambda r: Document(segments=(Segment(r.value),), source=r.source, index=r.index),
)
tokenizer = train(["text number 0123456789 " * 9], 300)
encoded = 0
def encode(texts, markup=False, plain=tokenizer.encode):
    global encoded
    encoded += sum(map(len, texts))
    return plain(texts, markup=markup)
tokenizer.encode = encode
open_or_build(Path({root!r}), {key!r}, documents, tokenizer)
print(encoded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def script(root: Path, count: int, batch: int) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(path=sys.path, root=str(root), key=KEY, count=count, batch=batch)]


def figures(root: Path, count: int, batch: int) -> tuple[int, int]:
    """Characters that were tokenised, peak memory in KiB."""
    out = subprocess.run(script(root, count, batch), capture_output=True, text=True, check=True).stdout
    encoded, peak = map(int, out.split())
    return encoded, peak


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_killed_build_never_opens_and_is_gone_on_with(tmp_path: Path) -> None:
    whole, _ = figures(tmp_path / "whole", 3_000, 50_000)
    process = subprocess.Popen(script(tmp_path / "killed", 3_000, 50_000))
    folder = tmp_path / "killed" / f".building-{store_key_of(tmp_path / 'whole')[:12]}"
    while not (folder / building_module.NOTE).exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").glob("[!.]*"))
    assert Store.open(folder, store_key_of(tmp_path / "whole")) is None
    rest, _ = figures(tmp_path / "killed", 3_000, 50_000)
    assert rest <= whole - 3 * 50_000  # what was noted is not tokenised again
    [first], [second] = (tmp_path / "whole").iterdir(), (tmp_path / "killed").iterdir()
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def store_key_of(root: Path) -> str:
    [folder] = root.iterdir()
    return str(json.loads((folder / "meta.json").read_text())["key"])


@pytest.mark.parametrize("name", [*building_module.DATA, building_module.NOTE])
def test_a_damaged_unfinished_build_begins_anew(
    name: str, tmp_path: Path, memory, letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building_module, "SAVE", 1)
    monkeypatch.setattr(building_module, "BATCH", 1)

    class Dying(letters):  # type: ignore[misc, valid-type]
        def encode(self, texts, *, markup=False):
            if "drei" in texts:
                raise KeyboardInterrupt
            return super().encode(texts, markup=markup)

    with pytest.raises(KeyboardInterrupt):
        open_or_build(tmp_path, KEY, memory(VALUES), Dying())
    [left] = [p for p in tmp_path.iterdir() if p.is_dir()]
    data = (left / name).read_bytes()
    assert data
    (left / name).write_bytes(data[:-2])
    again = open_or_build(tmp_path, KEY, memory(VALUES), letters())
    assert contents(again) == contents(open_or_build(tmp_path / "other", KEY, memory(VALUES), letters()))


@pytest.mark.skipif(os.name == "nt", reason="resource is not there on Windows")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = [figures(tmp_path / str(count), count, 300_000)[1] / 1024 for count in (2_000, 10_000)]  # 3 and 13 MB
    assert peaks[1] < peaks[0] + 20, f"peak MB: {peaks}"


def test_a_text_in_parts_is_one_document_with_the_ids_of_the_whole(tmp_path: Path, letters, monkeypatch) -> None:
    text = "".join(f"word {i} and " for i in range(4000))
    parts = [text[i : i + 7_000] for i in range(0, len(text), 7_000)]

    class Reader:
        def read(self, source):
            given = parts if source.name == "parts" else [text]
            return (
                Record(value=part, source=source.name, continues=i < len(given) - 1) for i, part in enumerate(given)
            )

    monkeypatch.setattr(encode_module, "TAIL", 1_000)
    monkeypatch.setattr(building_module, "BATCH", 10_000)
    for prefix in (True, False):
        found = []
        for name in ("parts", "whole"):
            sources = Sources(path="m", sources=(Source(path=name, name=name), Source(path="end", name="end")))
            documents = Documents(
                sources, lambda s: Reader(), lambda r: Document(segments=(Segment(r.value),), source=r.source)
            )
            found.append(open_or_build(tmp_path / name, KEY, documents, letters(prefix=prefix)))
        for name in ("tokens", "trained", "documents", "contents"):
            assert np.array_equal(getattr(found[0], name), getattr(found[1], name))
        assert (len(found[0]), found[0].counts.records) == (2, 2)


def test_two_builders_agree(tmp_path: Path, memory, letters) -> None:
    """The second finds the first's store in place at its rename."""

    class Racing(Documents):
        def walk(self, progress=None, tell=None):
            open_or_build(tmp_path, KEY, memory(VALUES), letters())
            return super().walk(progress, tell)

    sources = Sources(path="m", sources=tuple(Source(path=n, name=n) for n in VALUES))
    plain = memory(VALUES)
    racing = Racing(sources, lambda s: next(plain.known())[1], plain._extract)
    assert contents(open_or_build(tmp_path, KEY, racing, letters())) == contents(
        open_or_build(tmp_path / "other", KEY, memory(VALUES), letters())
    )
