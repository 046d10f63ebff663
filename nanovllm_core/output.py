"""The output folder: whose it is, what may be in it, and where a run goes on.

A folder belongs to the run whose identity its lock holds. The same run again goes on in it; another run moves the old
contents to `previous/N/` and begins anew; a folder that no run made is left alone. What is in the folder is looked at
before any callback hears of the run: what a callback makes there belongs to this run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm_core.errors import OutputError
from nanovllm_core.files import sync
from nanovllm_core.plan import PREVIOUS
from nanovllm_core.training.checkpoint import State, newest

LOCK, FINISHED = "plan.lock.json", "finished.json"
TOKENS, BUSY = "tokens", ".busy.lock"
KEPT = (PREVIOUS, TOKENS, BUSY)  # whatever run comes


@contextmanager
def claimed(folder: Path) -> Iterator[list[Path]]:
    """Hold `folder` for this process; the system lets go of it however the process ends. Gives what is in it.

    Raises OutputError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / BUSY)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise OutputError(
            f"output_dir {folder}: another run is writing there; wait for it or name another folder"
        ) from e
    except OSError as e:
        raise OutputError(f"output_dir {folder}: cannot be used ({e.strerror or e})") from e
    try:
        yield sorted(p for p in folder.iterdir() if p.name not in KEPT and p.suffix != ".partial")
    finally:
        lock.release()


def settle(folder: Path, entries: list[Path], identity: str, tell: Callable[[str], None]) -> tuple[Path, State] | None:
    """Make `folder`, which holds `entries`, this run's: the checkpoint to go on from, or None to begin.

    Raises OutputError.
    """
    moving = next((p for p in folder.glob(f"{PREVIOUS}/*.moving")), None)
    if not entries and moving is None:
        return None
    if moving is None:
        owner = _owner(folder)
        if owner is None:
            raise OutputError(
                f"output_dir {folder}: holds {entries[0].name} and no {LOCK}, so no run made it; name another folder or "
                "empty it"
            )
        if owner == identity:
            return newest(folder, tell)
        number = 1 + max((int(p.name) for p in folder.glob(f"{PREVIOUS}/*") if p.name.isdigit()), default=0)
        moving = folder / PREVIOUS / f"{number}.moving"  # found again, and finished, after a kill half-way
        moving.mkdir(parents=True)
        sync(moving.parent)
    for path in entries:
        os.replace(path, moving / path.name)
    old = moving.with_suffix("")
    os.replace(moving, old)
    tell(f"another data, tokenizer, model or training than the last time: the old contents of {folder} are in {old}")
    return None


def _owner(folder: Path) -> str | None:
    """The identity of the run that made the folder: from its lock, or where that is lost, from its checkpoints."""
    try:
        return str(json.loads((folder / LOCK).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        found = newest(folder, lambda text: None)
        return found[1].identity if found else None


def write_lock(folder: Path, lock: dict[str, Any]) -> None:
    """Replace the folder's lock."""
    _write(folder / LOCK, lock)


def mark_finished(folder: Path, step: int, length: dict[str, Any], files: Iterable[str]) -> None:
    """Note that the model of this step is exported (`files`) and has answered; `length` is how long was asked for."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    _write(folder / FINISHED, {"step": step, "length": length, "files": sizes})


def finished(folder: Path, step: int) -> dict[str, Any] | None:
    """The length that was asked for when the model of this step was finished; None when it is not, or not all there."""
    try:
        note = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in note["files"].items())
        return dict(note["length"]) if whole and note["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # a path that is no UTF-8 becomes a JSON escape
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
