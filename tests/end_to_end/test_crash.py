"""The short forms of benchmarks/crash.py and benchmarks/write_faults.py: real runs, killed and refused the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux: fork and pidfd")


def figures(tmp_path, script, *arguments):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments, "--out", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_a_run_killed_at_any_moment_goes_on_to_the_same_model(tmp_path):
    got = figures(tmp_path, "crash.py", "--kills", "10", "--operations", "10", "--seed", "5")
    assert got["instants"]["kills"] >= 10
    assert got["operations"]["kills"] >= 9  # two threads: the last operation may not come
    assert not got["instants"]["wrong"]
    assert not got["operations"]["wrong"]


def test_a_disk_that_fails_at_any_write_is_one_message_and_loses_nothing(tmp_path):
    got = figures(tmp_path, "write_faults.py", "--positions", "10", "--seed", "3")
    assert got["positions"] == 10
    assert not got["wrong"]
    assert {end.partition(":")[0] for end in got["ends"]} >= {"ENOSPC", "EIO", "EROFS", "limit"}
    assert sum(n for end, n in got["ends"].items() if end.endswith("error")) >= 7
