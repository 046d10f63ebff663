"""The file operations of this process under one folder, met one by one before they happen.

Python tells of most by audit events; fsync, which has none, is wrapped. What Rust writes (safetensors) is met by the
operations before and after it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMED = {"os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.chmod": 2, "os.truncate": None}
"""Event -> where its arguments hold the folder's handle that its path is relative to."""


def watch(root: Path, meet: Callable[[str, tuple[str, ...]], None]) -> None:
    """Call `meet(operation, absolute paths)` before each operation that changes something at or under `root`.

    What `meet` raises comes out of the operation. It cannot be undone: for a process that ends afterwards.
    """
    top, within = os.path.abspath(root), f"{os.path.abspath(root)}{os.sep}"
    ours, real_fsync, held = threading.local(), os.fsync, threading.RLock()

    def told(operation: str, *paths: str) -> None:
        if getattr(ours, "inside", False) or not any(p == top or p.startswith(within) for p in paths):
            return
        with held:
            ours.inside = True
            try:
                meet(operation, paths)
            finally:
                ours.inside = False

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & WRITES:
                told("open", _absolute(path, None))
        elif event == "os.rename":
            source, target, *handles = arguments
            told("rename", _absolute(source, handles[0]), _absolute(target, handles[1]))
        elif event in NAMED:
            place = NAMED[event]
            told(event.partition(".")[2], _absolute(arguments[0], arguments[place] if place else None))

    def fsync(handle: int) -> None:
        told("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        real_fsync(handle)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(heard)


def _absolute(path: Any, handle: Any) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    given = os.fsdecode(path)
    if not os.path.isabs(given) and isinstance(handle, int) and handle >= 0:
        given = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), given)
    return os.path.abspath(given)
