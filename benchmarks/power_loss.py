"""Cut the power at any moment: the newest checkpoint that was told of is found again, sound, and the run goes on.

    python benchmarks/power_loss.py [--states 3000] [--runs 60] [--seed 1] [--out FILE]

A run's file operations are recorded with what was written. Then `disk.py` replays the first operations of that log, up to
a random one, and leaves what a loss of power may leave. In each state, made into a real folder, `checkpoint.newest` must
find the newest checkpoint that `checkpoint_saved` had told of, or a newer one, with every byte right, and the folder must
still be known as the run's. From some of them (`--runs`) the command is really run to its end, which must equal the
unbroken run's. Exit code 1 where anything is not so.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import operations
import tiny_run
from disk import Disk, Entry
from tiny_run import OUT, child, difference, result, wait


class Recorder:
    """Writes the log of this process's operations on `folder / OUT`; paths are relative to `folder`.

    What was made or written since the operation before is seen by looking, so that it does not matter who wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.held = folder, [], {}

    def look(self) -> None:
        """Log what was made and written."""
        found: dict[str, bytes | None] = {}
        for path in (self.folder / OUT, *sorted((self.folder / OUT).rglob("*"))):
            if path.name != ".busy.lock" and path.exists():
                found[str(path.relative_to(self.folder))] = None if path.is_dir() else path.read_bytes()
        assert self.held.keys() <= found.keys(), f"unseen removal of {self.held.keys() - found.keys()}"
        for path, content in found.items():
            if path not in self.held:
                self.log.append(("mkdir", path) if content is None else ("write", path, content))
            elif content != self.held[path]:
                self.log.append(("write", path, content))
        self.held = found

    def meet(self, operation: str, paths: tuple[str, ...]) -> None:
        """An operation that is about to be done."""
        self.look()
        first, *more = (os.path.relpath(p, self.folder) for p in paths)
        if operation == "fsync" and (first in self.held or first == "."):
            self.log.append(("fsync", first))
        elif operation == "rename" and first in self.held:
            self.log.append(("rename", first, more[0]))
            gone = {p for p in self.held if p == more[0] or p.startswith(f"{more[0]}/")}
            moved = {p: p.replace(first, more[0], 1) for p in self.held if p == first or p.startswith(f"{first}/")}
            self.held = {moved.get(p, p): c for p, c in self.held.items() if p in moved or p not in gone}
        elif operation in ("remove", "rmdir") and first in self.held:
            self.log.append(("remove", first))
            del self.held[first]

    def saved(self, step: int) -> None:
        self.look()
        self.log.append(("saved", step))


def record(folder: Path) -> list[Entry]:
    """The log of a whole run. Saving waits here, so that the operations of two threads do not mix."""

    def act() -> int:
        from nanovllm_core import hookimpl, plan
        from nanovllm_core.training import saver

        recorder = Recorder(folder)

        class Told:
            @hookimpl
            def checkpoint_saved(self, step: int) -> None:
                recorder.saved(step)

        events, save = plan.Plan.events, saver.Saver.save
        plan.Plan.events = lambda self, more=(): events(self, (*more, Told()))

        def and_wait(self: Any, *arguments: Any) -> None:
            save(self, *arguments)
            self.finish()

        saver.Saver.save = and_wait
        operations.watch(folder, recorder.meet)
        code = tiny_run.run(folder)
        recorder.look()
        text = json.dumps(recorder.log, default=lambda content: {"base64": base64.b64encode(content).decode()})
        (folder / "log.json").write_text(text, encoding="utf-8")
        return code

    assert wait(child(act, folder / "last.log")) == 0, (folder / "last.log").read_text()
    text = (folder / "log.json").read_text(encoding="utf-8")
    return list(map(tuple, json.loads(text, object_hook=lambda held: base64.b64decode(held["base64"]))))


def lay(folder: Path, state: dict[str, bytes | None]) -> None:
    """Make a state a real folder."""
    shutil.rmtree(folder / OUT, ignore_errors=True)
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def judged(folder: Path, told: int, sound: dict[str, str]) -> str:
    """What is wrong with the folder as a state left it; empty when nothing is."""
    from nanovllm_core.errors import NanoError
    from nanovllm_core.output import claimed
    from nanovllm_core.training.checkpoint import newest

    try:
        with claimed(folder / OUT):
            found = newest(folder / OUT, lambda text: None)
    except (NanoError, OSError) as e:
        return f"the folder is not usable: {e}"
    if (found[1].step if found else 0) < told:
        return f"checkpoint-{told} was told of, found {found[0].name if found else 'none'}"
    if found:
        weights = hashlib.sha256((found[0] / "model.safetensors").read_bytes()).hexdigest()
        if sound[found[0].name] != weights:
            return f"{found[0].name} has other weights"
    return ""


def states(folder: Path, log: list[Entry], wanted: dict[str, Any], count: int, runs: int, seed: int) -> dict[str, Any]:
    """Distinct states, each judged; from `runs` of them the command is run to its end."""
    draw, began = random.Random(seed), time.perf_counter()
    sound: dict[str, str] = {}
    for operation, path, *rest in log:
        if operation == "write" and path.endswith(".partial/model.safetensors") and "checkpoint-" in path:
            sound[path.split("/")[1][1:].removesuffix(".partial")] = hashlib.sha256(rest[0]).hexdigest()
    seen: set[bytes] = set()
    wrong, by_told, run = [], Counter(), 0
    while len(seen) < count:
        disk, stop = Disk(), draw.randint(1, len(log))
        for entry in log[:stop]:
            disk.do(*entry)
        for _ in range(4):
            state = disk.crash(draw)
            key = hashlib.sha256(repr((disk.told, sorted(state.items()))).encode()).digest()
            if key in seen or len(seen) == count:
                continue
            seen.add(key)
            by_told[disk.told] += 1
            lay(folder, state)
            fault = judged(folder, disk.told, sound)
            if not fault and len(seen) * runs // count > run:
                run += 1
                lay(folder, state)
                code = wait(child(lambda: tiny_run.run(folder), folder / "last.log"))
                said = (folder / "last.log").read_text()[-600:]
                fault = difference(wanted, result(folder)) if code == 0 else f"exit {code}: {said}"
            if fault:
                wrong.append(f"after {stop} operations ({' '.join(map(str, log[stop - 1][:2]))}): {fault}")
    return {
        "states": len(seen),
        "operations": len(log),
        "states_by_newest_told": {str(k): n for k, n in sorted(by_told.items())},
        "run_to_the_end": run,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = tiny_run.workplace("power-loss")
    try:
        tiny_run.make(folder)
        log = record(folder)
        wanted = result(folder)
        figures = states(folder, log, wanted, args.states, args.runs, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{figures['states']} states, {len(figures['wrong'])} wrong, {figures['seconds']} s")
    for fault in figures["wrong"][:20]:
        print("   ", fault)
    print(tiny_run.written("power_loss", args.out, {"seed": args.seed, **figures}))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
