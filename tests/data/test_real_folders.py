"""What real folders hold beside documents: pipes, sockets, loops, files that change or vanish, a great many files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources, check_unchanged, fingerprint
from nanovllm_core.errors import DataError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and sockets are made differently on Windows")


class Lines:
    """A reader of one record a line, that does something between the first and the second."""

    def __init__(self, between=lambda: None) -> None:
        self.between = between

    def read(self, source: Source):
        with open(source.path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                yield Record(value=line, source=source.name, index=number)
                if number == 0:
                    self.between()


def documents(root: Path, between=lambda: None, allow: float = 0) -> Documents:
    reader = Lines(between)
    return Documents(
        Sources.find(str(root)),
        lambda s: reader if s.name.endswith(".txt") else None,
        lambda r: Document(segments=(Segment(r.value),), source=r.source, index=r.index),
        allow,
    )


def test_what_is_no_file_is_named_and_left_out(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "a.txt").write_text("text\n")
    os.mkfifo(root / "pipe.txt")
    (root / "loop.txt").symlink_to("loop.txt")
    (root / "broken.txt").symlink_to("nowhere")
    (root / "up").symlink_to(root)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)  # the path of a socket is short
        try:
            server.bind("socket.txt")
        finally:
            os.chdir(here)
        found = documents(root)
    assert found.all.odd == ("broken.txt", "loop.txt", "pipe.txt", "socket.txt")
    assert [d.text for d in found] == ["text\n"]
    assert len(found.fingerprint()) == 64


@pytest.mark.parametrize("allow", [0, 5])
@pytest.mark.parametrize("change", ["grows", "shrinks", "is touched", "vanishes"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: str, allow: int) -> None:
    path = tmp_path / "a.txt"

    def between() -> None:
        if change == "vanishes":
            path.unlink()
        elif change == "is touched":
            os.utime(path, ns=(1, 1))
        else:
            path.write_text("one\ntwo\nthree\n" if change == "grows" else "one\n")

    path.write_text("one\ntwo\n")
    found = documents(tmp_path, between, allow)
    with pytest.raises(DataError, match=r"^a\.txt: .*(changed while|vanished after).*run again"):
        found.count()
    assert found.counts is None


def test_a_file_that_changes_before_it_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    found = documents(tmp_path)
    check_unchanged(next(iter(found.all)))
    path.write_text("other\n")
    with pytest.raises(DataError, match=r"a\.txt: changed .*4 bytes before, 6 now"):
        found.fingerprint()


def test_unreadable_folders_and_files(tmp_path: Path) -> None:
    """As another user where we are root, whom nothing is refused."""
    root = tmp_path / "d"
    (root / "closed").mkdir(parents=True)
    (root / "a.txt").write_text("text\n")
    (root / "b.txt").write_text("secret\n")
    (root / "closed" / "c.txt").write_text("secret\n")
    for path, mode in ((root / "b.txt", 0), (root / "closed", 0), (root, 0o755)):
        path.chmod(mode)
    for parent in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            for said, what in (("closed: the folder cannot be read", lambda: documents(root)),):
                try:
                    what()
                except DataError as e:
                    assert said in str(e), e  # noqa: PT017
                else:
                    raise AssertionError("nothing was said")
            found = documents(root, allow=5)
            assert [d.text for d in found] == ["text\n"]
            assert found.counts is not None
            assert found.counts.damaged == 2
            assert len(found.fingerprint()) == 64
            code = 0
        except BaseException as e:
            os.write(2, repr(e).encode())
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    (root / "closed").chmod(0o755)


def test_a_folder_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "y.txt").write_text("text\n")
    stop = threading.Event()
    entries = os.listdir

    def vanishing(folder: str) -> list[str]:
        if folder.endswith("/b") and not stop.is_set():
            stop.set()
            (tmp_path / "b" / "y.txt").unlink()
            (tmp_path / "b").rmdir()
        return entries(folder)

    monkeypatch.setattr(os, "listdir", vanishing)
    with pytest.raises(DataError, match=r"b: the folder cannot be read \(No such file"):
        documents(tmp_path)


def test_names_that_are_no_unicode_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text\n")
    (tmp_path / "empty.txt").write_text("")
    found = documents(tmp_path)
    assert [d.source for d in found] == ["\\xff.txt"]
    assert [s.size for s in found.all] == [0, 5]


def test_many_files_are_the_same_from_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3000):
        folder = tmp_path / f"{i % 7}" / ("x" * (i % 100))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i} ä.txt").write_text("x" * (i % 5))
    in_memory = Sources.find(str(tmp_path))
    monkeypatch.setattr("nanovllm_core.data.sources.IN_MEMORY", 10)
    spilled = Sources.find(str(tmp_path))
    assert list(in_memory) == list(spilled)
    assert len(spilled) == 3000
    both = list(zip(spilled, spilled, strict=True))  # two walks at once
    assert all(a == b for a, b in both)
    assert fingerprint(in_memory) == fingerprint(spilled)


SCRIPT = """
import sys
sys.path[:] = {path!r}
import resource
from nanovllm_core import Recipe, Registry
from nanovllm_core.plan_data import plan_data
from nanovllm_core.slots import Slots
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = plan_data(
    Slots(Registry.from_environment(), Recipe.from_data({{"data": {{"path": {root!r}}}}})), Path("/nowhere")
).documents
documents.fingerprint()
count = documents.count().documents
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_follow_the_number_of_files(tmp_path: Path) -> None:
    """Folders of 500 files, so that no one of them is large. With a `Source` each, 20,000 files would take 8 MB more."""
    grown = []
    for number in (2_000, 22_000):
        root = tmp_path / str(number)
        for i in range(number // 500):
            folder = root / f"folder with a name of some length {i}"
            folder.mkdir(parents=True)
            for j in range(500):
                (folder / f"a file with a name of some length {j}.txt").write_text("x")
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(path=sys.path, root=str(root))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        count, memory = map(int, out.split())
        assert count == number
        grown.append(memory)
    assert grown[1] < grown[0] + 5, f"MB: {grown}"
