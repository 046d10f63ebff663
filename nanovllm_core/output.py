"""The output folder: whose it is, what may be in it, and where a run goes on.

A folder belongs to the run whose identity its lock holds. The same run again goes on in it; another run moves the old
contents to `previous/N/` and begins anew; a folder that no run made is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm_core.errors import OutputError
from nanovllm_core.training.checkpoint import State, newest

LOCK = "plan.lock.json"
PREVIOUS, TOKENS, BUSY = "previous", "tokens", ".busy.lock"  # kept whatever run comes


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it however the process ends. Raises OutputError."""
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
        yield
    finally:
        lock.release()


def settle(folder: Path, identity: str, tell: Callable[[str], None]) -> tuple[Path, State] | None:
    """Make `folder` this run's: the checkpoint to go on from, or None to begin. Raises OutputError."""
    kept = (PREVIOUS, TOKENS, BUSY)
    entries = sorted(p for p in folder.iterdir() if p.name not in kept and p.suffix != ".partial")
    if not entries:
        return None
    owner = _owner(folder)
    if owner is None:
        raise OutputError(
            f"output_dir {folder}: holds {entries[0].name} and no {LOCK}, so no run made it; name another folder or empty it"
        )
    if owner == identity:
        return newest(folder, tell)
    number = 1 + max((int(p.name) for p in folder.glob(f"{PREVIOUS}/*") if p.name.isdigit()), default=0)
    old = folder / PREVIOUS / str(number)
    old.mkdir(parents=True)
    for path in sorted(entries, key=lambda p: p.name != LOCK, reverse=True):  # the lock last: a kill half-way goes on
        os.replace(path, old / path.name)
    tell(f"another data, tokenizer, model or training than the last time: the old contents of {folder} are in {old}")
    return None


def _owner(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / LOCK).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_lock(folder: Path, lock: dict[str, Any]) -> None:
    """Replace the folder's lock."""
    partial = folder / f".{LOCK}.partial"
    text = json.dumps(lock, indent=1, ensure_ascii=False) + "\n"
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # a path that is no UTF-8 becomes a JSON escape
    os.replace(partial, folder / LOCK)
