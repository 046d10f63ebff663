"""Which checkpoints exist: written beside training, the newest and the best kept, older ones pruned.

Training waits while weights and moments are copied to host memory (on a CPU half a second a GB); hashing, writing and
syncing happen in a thread, one checkpoint at a time. The copy needs as much memory as the checkpoint; where that is not
free, training waits until the checkpoint is on disk. What the thread meets is raised at the next look: `poll`, `save`
or `finish`.

    checkpoints.json    {"latest": name, "best": name or null, "best_eval_loss": nats a token or null}

It moves when a checkpoint is whole and durable, and only then are older ones removed: never the newest, the best or the
one that this process went on from. It is for people and tools: a process that goes on asks the checkpoints themselves
and writes it anew, since a kill or a power cut may have come between a checkpoint and its pointer.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

from nanovllm_core.errors import OutputError
from nanovllm_core.files import MANIFEST, discard, read_json, replace_text, sync, writing
from nanovllm_core.training.checkpoint import State, best, numbered, save, save_part
from nanovllm_core.training.parts import ALONE, Snapshot
from nanovllm_core.training.world import World

POINTERS = "checkpoints.json"
GONE = ".gone"  # suffix of a checkpoint that is being removed
SPARE = 1.25  # of a snapshot's size must be free to take it


@define(eq=False, kw_only=True)
class Saver:
    """The checkpoints of one run in `root`.

    limit: newest checkpoints that are kept, beside the best; None keeps all
    write_rest: adds configuration and tokenizer to a checkpoint's folder
    saved: told of each checkpoint once it is whole, in the thread that calls `poll`, `save` or `finish`
    free: bytes of host memory that may be used now; 0 when unknown
    """

    root: Path
    limit: int | None
    write_rest: Callable[[Path], None]
    saved: Callable[[int, Path], None]
    free: Callable[[], int]
    resumed: Path | None = None  # where this process went on from
    mine: Callable[[Path], bool] = lambda folder: True  # whether a checkpoint may be pruned
    world: World = ALONE  # of several ranks the first keeps the folder, each writes its part
    best: str | None = None
    best_loss: float | None = None
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _writing: State | None = field(default=None, init=False)
    _saves: int = field(default=0, init=False)
    saved_step: int = field(
        default=0, init=False
    )  # of the newest checkpoint that is this process's own or it went on from

    def __attrs_post_init__(self) -> None:
        """Take up what an earlier process left. Raises OutputError."""
        if self.resumed is not None:
            self.saved_step = int(self.resumed.name.partition("-")[2])
        if self.resumed is not None and self.world.first:
            if found := best(self.root, self.saved_step):
                self.best, self.best_loss = found[0].name, found[1]
            self._point(self.resumed)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: State, snapshot: Callable[[bool], Snapshot], size: int) -> None:
        """Write a checkpoint of `size` bytes; returns when `snapshot(True)`, a copy, is taken. Raises OutputError.

        Where a copy does not fit, `snapshot(False)` is written as it stands, and this returns when it is on disk.
        """
        self.finish()
        copy = not 0 < self.free() < SPARE * size
        self._writing, self._saves, self.saved_step = state, self._saves + 1, state.step
        write = self._write if self.world.first else self._write_part
        arguments = (state, snapshot(copy), f"checkpoint/{self._saves}")
        self._thread = threading.Thread(target=write, args=arguments, name=f"checkpoint-{state.step}")
        self._thread.start()
        if not copy:
            self.finish()

    def poll(self) -> None:
        """Tell of a checkpoint that has become whole since. Raises what went wrong."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def settle(self) -> None:
        """Wait until nothing is being written; what went wrong is left for who raises already."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait until nothing is being written. Raises what went wrong."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert self._writing is not None
        step, self._writing = self._writing.step, None
        self.saved(step, self.root / f"checkpoint-{step}")

    def _write_part(self, state: State, snapshot: Snapshot, key: str) -> None:
        try:
            save_part(self.root, state, snapshot, self.world, key)
            self.world.hear(f"{key}/done")
        except BaseException as e:
            self._error = e

    def _write(self, state: State, snapshot: Snapshot, key: str) -> None:
        try:
            folder = save(self.root, state, snapshot, self.write_rest, self.world, key)
            loss = state.metrics.get("eval_loss")
            known = state.evaluated and loss is not None and not math.isnan(loss)
            if loss is not None and known and (self.best_loss is None or loss < self.best_loss):
                self.best, self.best_loss = folder.name, loss
            self._point(folder)
            self.world.tell(f"{key}/done", True)
        except BaseException as e:  # raised again where the run can hear it
            self._error = e
            self.world.fail(e)

    def _point(self, latest: Path) -> None:
        told = {"latest": latest.name, "best": self.best, "best_eval_loss": self.best_loss}
        with writing(self.root / POINTERS):
            replace_text(self.root / POINTERS, json.dumps(told) + "\n")
            self._prune(latest)

    def _prune(self, latest: Path) -> None:
        if self.limit is None:
            return
        last = int(
            latest.name.partition("-")[2]
        )  # newer ones were passed over as damaged: they take no sound one's place
        paths = [p for step, p in numbered(self.root) if step <= last and self.mine(p)]
        kept = {latest.name, self.best, self.resumed.name if self.resumed else None}
        kept.update(p.name for p in paths[-self.limit :])
        for path in (p for p in paths if p.name not in kept):
            gone = path.with_name(f".{path.name}{GONE}")
            path.replace(gone)  # at once, so that a kill leaves no half of it under the name
            sync(self.root)
            discard(gone)


def pointed(root: Path) -> str | None:
    """The newest checkpoint by the pointer; None where it leads nowhere."""
    try:
        name = read_json(root / POINTERS)["latest"]
        return str(name) if (root / name / MANIFEST).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def room_needed(root: Path, *, size: int, exported: int, limit: int | None, saves: int) -> None:
    """Refuse a run whose files will not fit on the disk, before its first step.

    size, exported: bytes of a checkpoint and of a final model; saves: checkpoints that the run will write
    Raises OutputError.
    """
    kept = saves if limit is None else min(saves, limit + 1)  # the best may be an older one
    needed = (kept + 1) * size + 2 * exported  # one more while it is written; the final model and perhaps the best
    there = sum(p.stat().st_size for p in root.glob("checkpoint-*/*") if p.is_file())
    free = shutil.disk_usage(root).free
    if free + there < needed:
        raise OutputError(
            f"output_dir {root}: {free / 1e9:.1f} GB are free and the run needs {(needed - there) / 1e9:.1f} GB "
            f"({kept + 1} checkpoints of {size / 1e9:.2f} GB and the model); lower train.save_total_limit (now {limit}), "
            "raise train.save_steps, or name an output_dir on another disk"
        )
