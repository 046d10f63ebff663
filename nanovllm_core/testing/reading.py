"""How much of a file is read, told without touching `open`."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from nanovllm_core.contracts import Source

LENGTH = 64 << 20  # bytes; a sparse file takes no room on disk
COUNTERS = Path("/proc/self/io")


def padded(folder: Path, name: str, content: bytes) -> Source:
    """A file that begins with `content` and is far longer than anything that a probe should read."""
    path = folder / "long" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.truncate(path, LENGTH)
    return Source(path=str(path), name=name, size=LENGTH)


def bytes_read(act: Callable[[], object]) -> int:
    """Bytes that the process read during `act`, where the system counts them (Linux); elsewhere the most it held."""
    before = _counted()
    tracemalloc.start()
    try:
        result = act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del result
    return peak if before is None else max(peak, (_counted() or 0) - before)


def _counted() -> int | None:
    try:
        return int(COUNTERS.read_text().split()[1])  # rchar: what read calls returned, from disk or cache
    except (OSError, ValueError, IndexError):
        return None
