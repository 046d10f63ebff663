"""The short form of benchmarks/power_loss.py: no cut of the power leaves a run without what it had told was saved."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")


@linux
def test_what_was_told_as_saved_outlives_a_power_cut(tmp_path):
    out = tmp_path / "figures.json"
    script = [
        sys.executable,
        BENCHMARKS / "power_loss.py",
        "--states",
        "200",
        "--runs",
        "5",
        "--seed",
        "7",
        "--out",
        out,
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(out.read_text())
    assert (got["states"], got["wrong"]) == (200, [])
    assert got["run_to_the_end"] >= 4
    assert len(got["states_by_newest_told"]) == 7, "before the first checkpoint and after each"


@pytest.fixture
def disk(monkeypatch):
    """An empty disk that can lose its power."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from disk import Disk

    return Disk()


def left(disk, times=300):
    draw = random.Random(3)
    return [disk.crash(draw) for _ in range(times)]


def test_the_disk_keeps_what_was_synced_and_may_lose_all_else(disk):
    disk.do("mkdir", "a")
    disk.do("write", "a/x", b"old")
    seen = left(disk)
    assert {len(state) for state in seen} == {0, 1, 2}
    assert {state["a/x"] for state in seen if "a/x" in state} >= {b"", b"old", b"ol", b"\0ld", b"ol\0"}
    for path in ("a/x", "a", "."):
        disk.do("fsync", path)
    assert left(disk, 20) == [{"a": None, "a/x": b"old"}] * 20
    disk.do("write", "a/y", b"new")
    disk.do("fsync", "a/y")
    disk.do("rename", "a/y", "a/x")
    disk.do("remove", "a/x")
    states = {tuple(sorted(state.items())) for state in left(disk)}
    assert states == {(("a", None), *rest) for rest in ((), (("a/x", b"old"),), (("a/x", b"new"),), (("a/y", b"new"),),
                      (("a/x", b"old"), ("a/y", b"new")))}  # fmt: skip
