"""Kill a run at any moment, run the same command again, and get bit for bit the model of the unbroken run.

    python benchmarks/crash.py [--kills 500] [--operations all|N] [--seed 1] [--out FILE]

First SIGKILL at instants drawn evenly over the run's length, again and again until the command ends by itself, and that
until there were so many kills. Then SIGKILL before each file operation under output_dir: saving, rotating, pointers,
lock, export, token store (N: as many, evenly over the run). After each end every loss, the weights (best/ too) and the
pointers must equal the unbroken run's, and nothing half-made may be left. Exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import operations
import tiny_run
from tiny_run import OUT, child, difference, result, wait

ATTEMPTS = 60  # of one trial; more means that it makes no way


def ended(folder: Path, wanted: dict[str, Any]) -> str:
    """Run the command to its end; what is wrong with it, or nothing."""
    log = folder / "last.log"
    code = wait(child(lambda: tiny_run.run(folder), log))
    return difference(wanted, result(folder)) if code == 0 else f"exit code {code}: {log.read_text()[-600:]}"


def at_instants(folder: Path, wanted: dict[str, Any], length: float, kills: int, seed: int) -> dict[str, Any]:
    """Kills at random instants, in trials that each begin with an empty folder."""
    draw, began = random.Random(seed), time.perf_counter()
    done, trials, most, wrong, later = 0, 0, 0, [], []
    while done < kills:
        shutil.rmtree(folder / OUT, ignore_errors=True)
        trials, here = trials + 1, 0
        for _ in range(ATTEMPTS):
            instant = draw.uniform(
                0, length * (1 + here / 10)
            )  # a machine may be slower than it was when it was measured
            code = wait(child(lambda: tiny_run.run(folder), folder / "last.log"), instant)
            if code != -signal.SIGKILL:
                break
            here += 1
            later.append(newest_of(folder))
        done, most = done + here, max(most, here)
        if code != 0:
            wrong.append(f"trial {trials}, after {here} kills, exit {code}: {(folder / 'last.log').read_text()[-600:]}")
        elif fault := difference(wanted, result(folder)):
            wrong.append(f"trial {trials}, after {here} kills: {fault}")
    return {
        "kills": done,
        "trials": trials,
        "most_kills_in_a_trial": most,
        "kills_by_newest_checkpoint": {str(k): n for k, n in sorted(Counter(later).items())},
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }


def newest_of(folder: Path) -> int:
    """The step of the newest checkpoint by name; 0 for none."""
    return max((int(p.name[11:]) for p in (folder / OUT).glob("checkpoint-*")), default=0)


def killed_at(folder: Path, number: int) -> int:
    """Run the command and kill it before its file operation `number`; its exit code. The operation is in `at.txt`."""

    def act() -> int:
        met = 0

        def meet(operation: str, paths: tuple[str, ...]) -> None:
            nonlocal met
            met += 1
            if met == number:
                said = " ".join([operation, *(os.path.relpath(p, folder / OUT) for p in paths)])
                (folder / "at.txt").write_text(said)
                os.kill(os.getpid(), signal.SIGKILL)

        operations.watch(folder / OUT, meet)
        code = tiny_run.run(folder)
        (folder / "count.txt").write_text(str(met))
        return code

    return wait(child(act, folder / "last.log"))


def at_operations(folder: Path, wanted: dict[str, Any], most: int | None) -> dict[str, Any]:
    """A kill before each file operation of a whole run, or before `most` of them."""
    began = time.perf_counter()
    shutil.rmtree(folder / OUT, ignore_errors=True)
    assert killed_at(folder, 0) == 0
    count = int((folder / "count.txt").read_text())
    numbers = range(1, count + 1) if most is None else [round((i + 0.5) * count / most) for i in range(most)]
    wrong, kinds = [], Counter()
    for number in numbers:
        shutil.rmtree(folder / OUT, ignore_errors=True)
        if killed_at(folder, number) != -signal.SIGKILL:
            continue  # two threads: this time the run had fewer operations
        at = (folder / "at.txt").read_text()
        kinds[at.split()[0]] += 1
        if fault := ended(folder, wanted):
            wrong.append(f"before operation {number} ({at}): {fault}")
    return {
        "operations_of_a_run": count,
        "kills": kinds.total(),
        "kills_by_operation": dict(kinds.most_common()),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--operations", default="all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = tiny_run.workplace("crash")
    try:
        tiny_run.make(folder)
        began = time.perf_counter()
        assert wait(child(lambda: tiny_run.run(folder), folder / "last.log")) == 0, (folder / "last.log").read_text()
        length = time.perf_counter() - began
        wanted = result(folder)
        assert wanted["sha256"].keys() >= {"best/model.safetensors"}, "the run must have a best checkpoint of its own"
        instants = at_instants(folder, wanted, length, args.kills, args.seed)
        most = None if args.operations == "all" else int(args.operations)
        operations_ = at_operations(folder, wanted, most)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, part in (("random instants", instants), ("file operations", operations_)):
        print(f"{name:16} {part['kills']:5} kills  {len(part['wrong']):3} wrong  {part['seconds']:7.1f} s")
        for fault in part["wrong"][:10]:
            print("   ", fault)
    figures = {"run_seconds": round(length, 2), "instants": instants, "operations": operations_, "seed": args.seed}
    print(tiny_run.written("crash", args.out, figures))
    return 1 if instants["wrong"] or operations_["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
