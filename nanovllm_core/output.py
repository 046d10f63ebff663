"""The output folder: whose it is, what may be in it, and where a run goes on.

A folder belongs to the run whose identity its lock holds. The same run again goes on in it; another run moves the old
contents to `previous/N/` and begins anew; a folder that no run made is left alone. What is in the folder is looked at
before any callback hears of the run: what a callback makes there belongs to this run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from nanovllm_core.errors import OutputError
from nanovllm_core.files import LOCK, make_folder, read_json, replace_text, sync, writing
from nanovllm_core.plan import PREVIOUS
from nanovllm_core.training.checkpoint import State, newest

FINISHED = "finished.json"
TOKENS, BUSY, BEST = "tokens", ".busy.lock", "best"
BEGINNING = f".{LOCK}.partial"  # all that a process killed while it made the folder its own leaves
BEGUN = ""  # the identity of a run that has not read its documents yet
KEPT = (PREVIOUS, TOKENS, BUSY)  # whatever run comes


@frozen
class Claim:
    """An output folder that is this process's for now, as it was found."""

    folder: Path
    entries: list[Path]  # what belongs to the run that was here
    owner: str | None  # that run's identity


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold `folder` for this process; the system lets go of it however the process ends.

    Raises OutputError when another process holds it, or it has contents that no run made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / BUSY)
    try:
        make_folder(folder)
        found = sorted(p for p in folder.iterdir() if p.name not in (BUSY, BEGINNING))
        lock.acquire(timeout=0)
    except Timeout as e:
        raise OutputError(
            f"output_dir {folder}: another run is writing there; wait for it or name another folder"
        ) from e
    except OSError as e:
        raise OutputError(f"output_dir {folder}: cannot be used ({e.strerror or e})") from e
    try:
        owner = _owner(folder) if found else None
        if found and owner is None and not any(folder.glob(f"{PREVIOUS}/*/{LOCK}")):
            raise OutputError(
                f"output_dir {folder}: holds {found[0].name} and no {LOCK}, so no run made it; name another folder or "
                "empty it"
            )
        if not found:
            write_lock(folder, {"identity": BEGUN})
        entries = [p for p in found if p.name not in KEPT and not (p.name[0] == "." and p.suffix == ".partial")]
        yield Claim(folder, entries, owner)
    finally:
        lock.release()


def settle(
    claim: Claim, identity: str, length: dict[str, Any], tell: Callable[[str], None]
) -> tuple[Path, State] | None:
    """Make the folder this run's: the checkpoint to go on from, or None to begin, or when `length` is reached."""
    with writing(claim.folder):
        return _settle(claim, identity, length, tell)


def _settle(
    claim: Claim, identity: str, length: dict[str, Any], tell: Callable[[str], None]
) -> tuple[Path, State] | None:
    folder, why = claim.folder, "another data, tokenizer, model or training than the last time"
    moving = next((p for p in folder.glob(f"{PREVIOUS}/*.moving")), None)
    if moving is None:
        if claim.owner == identity:
            found, done = newest(folder, tell, identity), finished(folder)
            if found or (done and done[1] == length) or not _holds_work(claim.entries):
                return found
            why = "no sound checkpoint to go on from, so the run begins anew"
        elif not any(p.name != LOCK for p in claim.entries):
            return None
        number = 1 + max((int(p.name) for p in folder.glob(f"{PREVIOUS}/*") if p.name.isdigit()), default=0)
        moving = folder / PREVIOUS / f"{number}.moving"  # found again, and finished, after a kill half-way
        moving.mkdir(parents=True)
        for above in (moving.parent, folder):  # before anything is in it, so that a power cut takes nothing along
            sync(above)
    for path in claim.entries:
        os.replace(path, moving / path.name)
    for changed in (moving, folder):
        sync(changed)
    old = moving.with_suffix("")
    os.replace(moving, old)
    sync(old.parent)
    tell(f"{why}: the old contents of {folder} are in {old}")
    return None


def tidy(folder: Path) -> None:
    """Remove the token stores that killed processes began: none is begun while this process holds the folder."""
    for left in (folder / TOKENS).glob(".building-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)  # the lock of such a store


def _holds_work(entries: Iterable[Path]) -> bool:
    """Whether there is more than an interrupted run leaves before its first checkpoint."""
    return any(p.name == "config.json" or p.name.startswith("checkpoint-") for p in entries)


def _owner(folder: Path) -> str | None:
    """The identity of the run that made the folder: from its lock, or where that is lost, from its checkpoints."""
    if (locked := locked_by(folder)) is not None:
        return locked
    found = newest(folder, lambda text: None)
    return found[1].identity if found else None


def locked_by(folder: Path) -> str | None:
    """The identity in the folder's lock; None without a lock that can be read."""
    try:
        return str(read_json(folder / LOCK)["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_lock(folder: Path, lock: dict[str, Any]) -> None:
    """Replace the folder's lock."""
    _write(folder / LOCK, lock)


def mark_finished(folder: Path, step: int, length: dict[str, Any], files: Iterable[str]) -> None:
    """Note that the model of this step is exported (`files`) and has answered; `length` is how long was asked for."""
    with writing(folder):
        sizes = {name: (folder / name).stat().st_size for name in files}
        sync(folder)  # `best/` must not be lost where the note is not
    _write(folder / FINISHED, {"step": step, "length": length, "files": sizes})


def finished(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Step of the finished model and the length that was asked for; None when there is none, or not all of it."""
    try:
        note = read_json(folder / FINISHED)
        whole = all((folder / name).stat().st_size == size for name, size in note["files"].items())
        return (int(note["step"]), dict(note["length"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, data: dict[str, Any]) -> None:
    with writing(path):
        replace_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
