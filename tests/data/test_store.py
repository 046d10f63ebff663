"""The token store: what it holds, found again, never half-built, and memory that does not follow the corpus."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanovllm_core.contracts import Source
from nanovllm_core.data import store as store_module
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import Store, known_counts, open_or_build, store_key
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
    monkeypatch.setattr(store_module, "BATCH", 1)
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
    assert known_counts(tmp_path, "2" * 64) == second.counts
    assert known_counts(tmp_path, "1" * 64) is None
    (second.folder / "meta.json").write_text("{")
    assert known_counts(tmp_path, "2" * 64) is None


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "documents.bin", "meta.json", "sources.json"])
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
from pathlib import Path
from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.data.store import open_or_build
from nanovllm_tokenizers.bpe import train

class Endless:
    def read(self, source):
        for i in range({count}):
            yield Record(value=f"text number {{i}} " * 40, source="s", index=i)
            if i == 5_000:
                print("well under way", flush=True)

documents = Documents(
    Sources(path="s", sources=(Source(path="s", name="s", size=1),)), lambda s: Endless(),
    lambda r: Document(segments=(Segment(r.value),), source="s", index=r.index),
)
open_or_build(Path({root!r}), {key!r}, documents, train(["text number 0123456789 " * 9], 300))
print("done", end=" ")
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def script(root: Path, count: int) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(path=sys.path, root=str(root), key=KEY, count=count)]


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
def test_a_build_killed_half_way_leaves_nothing_that_opens(tmp_path: Path, memory, letters) -> None:
    process = subprocess.Popen(script(tmp_path, 10**9), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "well under way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".building-")
    assert (left / "tokens.bin").stat().st_size > 0
    assert Store.open(left, KEY) is None
    assert Store.open(tmp_path / KEY[:32], KEY) is None
    store = open_or_build(tmp_path, KEY, memory(VALUES), letters())
    assert len(store) == 4


@pytest.mark.skipif(os.name == "nt", reason="resource is not there on Windows")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for count in (6_000, 18_000):  # 5 and 14 MB of text: 3 and 7 batches
        out = subprocess.run(script(tmp_path / str(count), count), capture_output=True, text=True, check=True).stdout
        peaks.append(int(out.rsplit("done", 1)[1]) / 1024)
    assert peaks[1] < peaks[0] + 30, f"peak MB: {peaks}"


def test_two_builders_agree(tmp_path: Path, memory, letters) -> None:
    """The second finds the first's store in place at its rename."""

    class Racing(Documents):
        def walk(self, progress=None):
            open_or_build(tmp_path, KEY, memory(VALUES), letters())
            return super().walk(progress)

    sources = Sources(path="m", sources=tuple(Source(path=n, name=n) for n in VALUES))
    plain = memory(VALUES)
    racing = Racing(sources, lambda s: plain._known[0][1], plain._extract)
    assert contents(open_or_build(tmp_path, KEY, racing, letters())) == contents(
        open_or_build(tmp_path / "other", KEY, memory(VALUES), letters())
    )
