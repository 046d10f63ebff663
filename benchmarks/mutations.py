"""Seed the bugs of mutants.py and mutants_training.py, one at a time: the tests must fail for each.

    python benchmarks/mutations.py [NAME ...] [--out FILE]

Each bug is a replacement of text in a copy of the tree; the named tests run there. One that no test sees is printed as
`survived`, and then the exit code is 1. Takes about half an hour.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny_run
from mutants import BUGS as SAVING
from mutants_training import BUGS as TRAINING

REPOSITORY = Path(__file__).parents[1]
BUGS = SAVING | TRAINING


def seen(copy: Path, bug: str) -> tuple[bool, str]:
    """Whether the tests fail with the bug in, and the first that does."""
    name, old, new, tests = BUGS[bug]
    path = copy / name
    whole = path.read_text()
    assert whole.count(old) == 1, f"{bug}: {name} has the text {whole.count(old)} times"
    path.write_text(whole.replace(old, new))
    roots = [copy, *(p for p in (copy / "plugins").iterdir() if p.is_dir())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    finally:
        path.write_text(whole)
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 1, failed.partition(" - ")[0].removeprefix("FAILED ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="words of the bugs to seed (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chosen = [bug for bug in BUGS if not args.names or any(name in bug for name in args.names)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        copy = Path(place) / "tree"
        shutil.copytree(
            REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv*", ".assets", "__pycache__", "demo")
        )
        for bug in chosen:
            began = time.perf_counter()
            caught, by = seen(copy, bug)
            rows.append({"bug": bug, "caught": caught, "by": by, "seconds": round(time.perf_counter() - began, 1)})
            print(f"{'caught  ' if caught else 'survived'} {bug}  [{by}]", flush=True)
    survived = [row["bug"] for row in rows if not row["caught"]]
    print(f"{len(rows)} bugs, {len(survived)} survived")
    if args.out or not args.names:
        print(tiny_run.written("mutations", args.out, {"bugs": len(rows), "survived": survived, "table": rows}))
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
