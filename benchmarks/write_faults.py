"""A disk that is full, fails or turns read-only, at any write: one clear message, nothing lost, and the run goes on after.

    python benchmarks/write_faults.py [--positions 60] [--seed 1] [--out FILE]

Positions lie evenly over the file operations of a run; at each, in turn:
    full        a real disk of 8 MB (tmpfs; needs root, else left out) is filled up but for some KB, Rust's writes included
    ENOSPC      from there on nothing can be made, written or synced
    EIO         this one operation fails
    EROFS       from there on every operation fails
    limit       no file may grow beyond some KB (RLIMIT_FSIZE; not tied to a position)
The command must end with exit code 2 and one message that names a place in the output folder, or, where the operation only
clears something away, with the right result. The newest checkpoint that was told of must still load; and the same command,
with the disk well again, must give the unbroken result. Exit code 1 where anything is not so.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import operations
import tiny_run
from tiny_run import child, difference, result, wait

OUT = "disk/out"
MAKING = ("open", "mkdir", "fsync")
SIZE = 8 << 20


def faulty(folder: Path, kind: str, number: int, left: int) -> tuple[int, str]:
    """Run the command with a fault at operation `number` (`left`: bytes that still can be written); exit code, output."""

    def act() -> int:
        from nanovllm_core import hookimpl, plan

        met = 0

        class Told:
            @hookimpl
            def checkpoint_saved(self, step: int) -> None:
                (folder / "told.txt").write_text(str(step))

        events = plan.Plan.events
        plan.Plan.events = lambda self, more=(): events(self, (*more, Told()))

        def meet(operation: str, paths: tuple[str, ...]) -> None:
            nonlocal met
            met += 1
            if kind == "full" and met == number:
                free = shutil.disk_usage(folder / "disk").free
                (folder / "disk" / "ballast").write_bytes(bytes(max(0, free - left)))
            elif kind.startswith("E") and (met == number if kind == "EIO" else met >= number > 0):
                if kind == "ENOSPC" and operation not in MAKING:
                    return
                if met == number:
                    (folder / "at.txt").write_text(f"{operation} {os.path.relpath(paths[0], folder / OUT)}")
                code = getattr(errno, kind)
                raise OSError(code, os.strerror(code), paths[0])

        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        operations.watch(folder / OUT, meet)
        code = tiny_run.run(folder, OUT)
        (folder / "count.txt").write_text(str(met))
        return code

    return wait(child(act, folder / "last.log")), (folder / "last.log").read_text()


def fresh(folder: Path) -> None:
    shutil.rmtree(folder / OUT, ignore_errors=True)
    for name in ("disk/ballast", "told.txt", "at.txt"):
        (folder / name).unlink(missing_ok=True)


def told(folder: Path) -> int:
    """The newest checkpoint of which callbacks have heard."""
    path = folder / "told.txt"
    return int(path.read_text() or 0) if path.exists() else 0


def judged(folder: Path, code: int, said: str, wanted: dict[str, Any]) -> str:
    """What is wrong after a run with a fault; empty when nothing is. Runs the command once more, to its end."""
    from nanovllm_core.training.checkpoint import newest

    (folder / "disk" / "ballast").unlink(missing_ok=True)
    message = [line for line in said.splitlines() if line.startswith("nanovllm: ")]
    if "Traceback" in said or code not in (0, 2):
        return f"exit code {code}: {said[-700:]}"
    if code == 2 and (len(message) != 1 or str(folder / OUT) not in message[0]):
        return f"messages: {message}"
    found = newest(folder / OUT, lambda text: None) if (folder / OUT).exists() else None
    if (found[1].step if found else 0) < told(folder):
        return f"checkpoint-{told(folder)} was told of, found {found}"
    again = wait(child(lambda: tiny_run.run(folder, OUT), folder / "last.log"))
    if again:
        return f"the same command afterwards: exit code {again}: {(folder / 'last.log').read_text()[-700:]}"
    return difference(wanted, result(folder, OUT))


def tried(
    folder: Path, wanted: dict[str, Any], count: int, positions: int, kinds: list[str], seed: int
) -> dict[str, Any]:
    """A fault at each position, kinds taking turns."""
    draw, began = random.Random(seed), time.perf_counter()
    wrong, ends, places, at_most = [], Counter(), set(), 0
    for i in range(positions):
        kind = kinds[i % len(kinds)]
        number, left = round((i + 0.5) * count / positions), draw.randrange(64 << 10)
        fresh(folder)
        code, said = faulty(folder, kind, number, left)
        at = (folder / "at.txt").read_text() if (folder / "at.txt").exists() else f"operation {number}"
        ends[f"{kind}: {'error' if code == 2 else 'no harm' if code == 0 else 'crash'}"] += 1
        places.add(at)
        at_most = max(at_most, told(folder))
        if fault := judged(folder, code, said, wanted):
            wrong.append(f"{kind} at {number} ({at}), {left} bytes left: {fault}")
    return {
        "positions": positions,
        "places": len(places),
        "ends": dict(sorted(ends.items())),
        "newest_checkpoint_told": at_most,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }


def with_disk(folder: Path, act: Callable[[bool], int]) -> int:
    """Call `act(whether folder/disk is a small disk of its own)`."""
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder / "disk")]
    small = hasattr(os, "getuid") and os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        return act(small)
    finally:
        if small:
            subprocess.run(["umount", str(folder / "disk")], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = tiny_run.workplace("write-faults")

    def act(small: bool) -> int:
        code, said = faulty(folder, "none", 0, 0)
        assert code == 0, said
        wanted, count = result(folder, OUT), int((folder / "count.txt").read_text())
        kinds = [*(["full"] if small else []), "ENOSPC", "EIO", "EROFS", "limit"]
        figures = tried(folder, wanted, count, args.positions, kinds, args.seed)
        print(
            f"{figures['positions']} positions, {len(figures['wrong'])} wrong, {figures['seconds']} s: {figures['ends']}"
        )
        for fault in figures["wrong"][:20]:
            print("   ", fault)
        figures = {"seed": args.seed, "operations_of_a_run": count, "real_disk": small, **figures}
        print(tiny_run.written("write_faults", args.out, figures))
        return 1 if figures["wrong"] else 0

    try:
        tiny_run.make(folder)
        return with_disk(folder, act)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
