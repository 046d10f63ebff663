"""Kill or freeze any rank at any moment: the others end in time, nobody is left, and the same command goes on to the same model.

    python benchmarks/lost_ranks.py [--trials 20] [--ranks 2] [--parallel ddp] [--seed 1] [--out FILE]

Each trial starts `nanovllm run --nproc N` on layouts.py's documents and model, ends a random rank at a random moment of it by
SIGKILL (one in four: stops it by SIGSTOP, as a hang would), and waits for the launcher; then runs the command to its end. Every
loss and the weights must equal the unbroken run's. Exit code 1 where anything is not so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layouts
import tiny_run
from tiny_run import difference, result

TIMEOUT, GRACE = 8, 10  # seconds: train.rank_timeout, and what is left to end in
MEETING = 120  # seconds that ranks of one machine wait for one that has not come


def start(folder: Path, ranks: int, parallel: str, out: str) -> subprocess.Popen[str]:
    sets = (
        "train.max_steps=40", "train.save_steps=5", "train.eval_steps=20", f"train.rank_timeout={TIMEOUT}",
        f"parallel={parallel}", f"output_dir={out}",
    )  # fmt: skip
    words = [word for s in sets for word in ("--set", s)]
    command = [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml", "--nproc", str(ranks), *words]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def of_run(folder: Path) -> dict[int, int]:
    """Process by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = dict(p.partition("=")[::2] for p in (path / "environ").read_text().split("\0"))
            if "RANK" in told and (path / "cwd").resolve() == folder.resolve():
                found[int(told["RANK"])] = int(path.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


def trial(
    folder: Path, draw: random.Random, length: float, args: argparse.Namespace, wanted: dict[str, Any]
) -> dict[str, Any]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    how = draw.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP])
    process = start(folder, args.ranks, args.parallel, "out")
    time.sleep(draw.uniform(0.2, 0.95) * length)
    there, met = of_run(folder), (folder / "out").exists()
    if not there:
        process.communicate()
        return {"how": "it had ended", "wrong": difference(wanted, result(folder))}
    rank = draw.choice(sorted(there))
    os.kill(there[rank], how)
    began = time.monotonic()
    try:
        _, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        if how != signal.SIGSTOP or of_run(folder) != {rank: there[rank]}:
            for pid in of_run(folder).values():
                os.kill(pid, signal.SIGABRT)  # where it stands
            _, err = process.communicate(timeout=30)
            return {"how": how.name, "rank": rank, "wrong": f"did not end: {err[-6000:]}"}
        os.kill(there[rank], signal.SIGKILL)  # it had left and was ending: only its launcher waits for it
        process.communicate()
        return {"how": "SIGSTOP at its exit", "rank": rank, "wrong": difference(wanted, result(folder))}
    seconds = time.monotonic() - began
    told = err.strip().splitlines()
    row: dict[str, Any] = {"how": how.name, "rank": rank, "seconds": round(seconds, 1), "said": told[:2]}
    left = of_run(folder)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    again = start(folder, args.ranks, args.parallel, "out")
    _, err = again.communicate(timeout=300)
    faults = [
        "took too long" if seconds > (TIMEOUT if met or how == signal.SIGKILL else MEETING + TIMEOUT) + GRACE else "",
        f"left behind: {sorted(left)}" if left else "",
        f"exit code {again.returncode}: {err[-500:]}" if again.returncode else difference(wanted, result(folder)),
    ]
    return row | {"wrong": "; ".join(f for f in faults if f)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder, draw = tiny_run.workplace("lost"), random.Random(args.seed)
    try:
        layouts.make(folder)
        began = time.perf_counter()
        whole = start(folder, args.ranks, args.parallel, "out")
        _, err = whole.communicate()
        assert whole.returncode == 0, err
        length, wanted = time.perf_counter() - began, result(folder)
        rows: list[dict[str, Any]] = []
        while sum("rank" in row for row in rows) < args.trials:
            rows.append(trial(folder, draw, length, args, wanted))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows)} trials, {len(wrong)} wrong")
    figures = {"parallel": args.parallel, "ranks": args.ranks, "run_seconds": round(length, 1), "trials": rows}
    print(tiny_run.written("lost_ranks", args.out, figures))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
