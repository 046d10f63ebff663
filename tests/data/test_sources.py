"""What is found under data.path, in which order, and what its fingerprint depends on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanovllm_core.data.sources import Sources, fingerprint, suffix_of
from nanovllm_core.errors import DataError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def names(sources: Sources) -> list[str]:
    return [s.name for s in sources]


def test_a_folder_is_walked_in_the_order_of_names(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "b.txt", "a/z.jsonl", "a/b/c.JSON", "a.txt", "README", "ä.txt")
    tree(root, ".hidden/x.txt", "a/.y.txt")
    found = Sources.find(str(root))
    assert names(found) == ["README", "a/b/c.JSON", "a/z.jsonl", "a.txt", "b.txt", "ä.txt"]
    assert found.suffixes == {"": 1, ".json": 1, ".jsonl": 1, ".txt": 3}
    assert (found.count, len(found), found.hidden, found.odd) == (6, 6, 2, ())
    assert found.bytes == sum(len(n.encode()) for n in names(found))
    assert all(Path(s.path).is_absolute() and Path(s.path).read_text() == s.name for s in found)


def test_a_file_and_a_string_that_is_neither(tmp_path: Path) -> None:
    root = tree(tmp_path, "x.txt")
    assert [(s.name, s.size, s.exists) for s in Sources.find(str(root / "x.txt"))] == [("x.txt", 5, True)]
    [other] = Sources.find("memory://7")
    assert (other.path, other.name, other.exists) == ("memory://7", "memory://7", False)


def test_the_output_folder_is_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "a.txt", "out/metrics.jsonl", "out/deep/b.txt")
    assert names(Sources.find(str(root), exclude=root / "out")) == ["a.txt"]
    assert names(Sources.find(str(root / "out"), exclude=tmp_path)) == ["deep/b.txt", "metrics.jsonl"]
    with pytest.raises(DataError, match="the same folder"):
        Sources.find(str(root), exclude=root)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are made differently on Windows")
def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "a.txt", "sub/b.txt")
    tree(tmp_path / "elsewhere", "c.txt")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "loop").symlink_to(root)
    (root / "broken").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    found = Sources.find(str(root))
    assert names(found) == ["a.txt", "link/c.txt", "sub/b.txt"]
    assert found.odd == ("broken", "pipe")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on Linux alone")
def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "a.txt")
    try:
        (root / os.fsdecode(b"\xff.txt")).write_text("x")
    except OSError:
        pytest.skip("this file system refuses such names")
    found = Sources.find(str(root))
    assert names(found) == ["a.txt", "\\xff.txt"]
    assert len(fingerprint(found)) == 64


def test_fingerprint_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    def of(root: Path) -> str:
        return fingerprint(Sources.find(str(root)))

    one, two = tree(tmp_path / "1", "a.txt", "b/c.txt"), tree(tmp_path / "2", "b/c.txt", "a.txt")
    os.utime(two / "a.txt", (1, 1))
    assert of(one) == of(two)
    (two / "a.txt").write_text("a.txT")
    assert of(one) != of(two)
    (two / "a.txt").rename(two / "d.txt")
    (two / "d.txt").write_text("a.txt")
    assert of(one) != of(two)


def test_fingerprint_tells_how_far_it_is_and_refuses_what_is_no_file(tmp_path: Path) -> None:
    found = Sources.find(str(tree(tmp_path, "a.txt", "b.txt")))
    told: list[tuple[int, int]] = []
    fingerprint(found, lambda done, total: told.append((done, total)))
    assert told == [(0, 10), (5, 10), (10, 10)]
    with pytest.raises(DataError, match="no file"):
        fingerprint(Sources.find("memory://7"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: it vanished"):
        fingerprint(found)


def test_suffix() -> None:
    found = Sources.find("nothing.Here.TXT")
    assert suffix_of(next(iter(found))) == ".txt"
