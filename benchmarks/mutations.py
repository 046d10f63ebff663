"""Seed bugs in saving, going on and stopping, one at a time: the tests must fail for each.

    python benchmarks/mutations.py [NAME ...] [--out FILE]

Each bug is a replacement of text in a copy of the tree; the named tests run there. One that no test sees is printed as
`survived`, and then the exit code is 1. Takes about ten minutes.
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

REPOSITORY = Path(__file__).parents[1]
CORE = "nanovllm_core/"
FILES, SAVER, CHECKPOINT = CORE + "files.py", CORE + "training/saver.py", CORE + "training/checkpoint.py"
JOB, OUTPUT, EXPORT = CORE + "job.py", CORE + "output.py", CORE + "training/export.py"
POWER, CRASH = "tests/training/test_power_loss.py", "tests/end_to_end/test_crash.py"
SAVED, READ, RUN = "tests/training/test_saver.py", "tests/training/test_checkpoint.py", "tests/end_to_end/test_run.py"
HOSTILE, OUT = "tests/end_to_end/test_hostile_checkpoints.py", "tests/end_to_end/test_output.py"
CORRUPT, STOPPED = "tests/training/test_corruption.py", "tests/end_to_end/test_interrupt.py"

# Bug -> file, text, what stands there instead, tests that must see it.
BUGS: dict[str, tuple[str, str, str, str]] = {
    "files of a checkpoint are not synced": (FILES, "        for p in files:\n            sync(p)\n", "", POWER),
    "the manifest is not synced": (FILES, "        sync(partial / MANIFEST)\n", "", POWER),
    "the folder of a checkpoint is not synced": (
        FILES,
        "        sync(partial)\n        if folder",
        "        if folder",
        POWER,
    ),
    "the rename of a checkpoint is not synced": (
        FILES,
        "        os.replace(partial, folder)\n        sync(folder.parent)\n",
        "        os.replace(partial, folder)\n",
        POWER,
    ),
    "the output folder's own entry is not synced": (
        FILES,
        "        sync(path.parent)\n\n\ndef share",
        "        pass\n\n\ndef share",
        POWER,
    ),
    "a small file is replaced before it is synced": (
        FILES,
        "    sync(partial)\n    os.replace(partial, path)",
        "    os.replace(partial, path)",
        POWER,
    ),
    "best/ is not synced before the run is called finished": (
        OUTPUT,
        "        sync(folder)  # `best/`",
        "        # `best/`",
        POWER,
    ),
    "an exported file is not synced": (EXPORT, "            sync(path)\n", "", POWER),
    "metrics are not synced": (CORE + "callbacks/metrics.py", "                sync(path)\n", "", POWER),
    "what a kill took away is not brought back": (
        FILES,
        "    if old.exists() and not folder.exists():",
        "    if False:",
        READ,
    ),
    "digests are not compared": (
        FILES,
        "            if digest(folder / name) != sha256:",
        "            if False:",
        CORRUPT,
    ),
    "sizes alone are believed of a missing file": (
        FILES,
        '            return f"{name} is missing"',
        "            return None",
        CORRUPT,
    ),
    "links are followed": (FILES, "if path.resolve() != path or root not in path.parents", "if False", HOSTILE),
    "the newest is taken by name": (CHECKPOINT, "(int(m.group(1)), p)\n", "(p.name, p)\n", READ),
    "a checkpoint of another run is used": (
        CHECKPOINT,
        "if identity is not None and state.identity != identity",
        "if False",
        HOSTILE,
    ),
    "a snapshot shares its memory": (CHECKPOINT, 'to("cpu", copy=True)', 'to("cpu")', SAVED),
    "the moments are not loaded": (
        JOB,
        "            checkpoint.load_optimizer(",
        "            (lambda *a: None)(",
        RUN,
    ),
    "the random state is not restored": (
        JOB,
        "            checkpoint.set_random_state(state.random[0])\n",
        "",
        "tests/end_to_end/test_any_architecture.py",
    ),
    "the position is off by one": (JOB, "position=trainer.position,", "position=trainer.position + 1,", RUN),
    "the best is pruned": (SAVER, "latest.name, self.best, self", "latest.name, self", SAVED),
    "the one gone on from is pruned": (SAVER, "self.resumed.name if self.resumed else None", "None", SAVED),
    "damaged newer ones take the place of sound ones": (SAVER, " if step <= last]", "]", SAVED),
    "the best is forgotten on going on": (SAVER, "if found := best(", "if found := (lambda *a: None)(", SAVED),
    "pointers are not mended on going on": (SAVER, "            self._point(self.resumed)\n", "", CORRUPT),
    "the later of two equal losses is the best": (SAVER, "loss < self.best_loss", "loss <= self.best_loss", SAVED),
    "pointers move before the checkpoint is written": (
        SAVER,
        "            folder = save(self.root, state, snapshot, self.write_rest)\n",
        '            folder = self.root / f"checkpoint-{state.step}"\n            self._point(folder)\n'
        "            save(self.root, state, snapshot, self.write_rest)\n",
        SAVED,
    ),
    "an error of the writing thread is lost": (SAVER, "            raise error\n", "            return\n", SAVED),
    "figures of an older step make a best": (SAVER, "if state.evaluated and loss", "if loss", SAVED),
    "a folder that a kill left half begun is refused": (OUTPUT, "not in (BUSY, BEGINNING)", "not in (BUSY,)", OUT),
    "token stores that kills left stay": (OUTPUT, '.glob(".building-*")', '.glob("never-*")', OUT),
    "metrics keep what is done again": (
        CORE + "callbacks/metrics.py",
        "if _order(text) < _order",
        "if _order(text) <= _order",
        RUN,
    ),
    "an interrupted step counts as evaluated": (JOB, "evaluated=trainer.evaluated,", "evaluated=True,", STOPPED),
    "a wish to stop is not heard": (
        CORE + "training/stop.py",
        "        if self.asked:\n",
        "        if False:\n",
        STOPPED,
    ),
    "an interrupted run is not saved": (
        JOB,
        "                save(trainer)\n            saver.finish()",
        "                pass\n            saver.finish()",
        STOPPED,
    ),
}


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
