"""`MemoryManager`: what a stretch of code holds in memory, on a GPU or in this process."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from nanovllm_core.memory_table import size_text

PROCESS = "/proc/self"


class MemoryManager:
    """Measures the memory of a device: of a GPU what torch has allocated there, of a CPU what this process holds.

    stats: name of a profiled stretch -> `before`, `after`, `peak` (bytes) and `seconds`, of its last time
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.stats: dict[str, dict[str, float]] = {}

    def used(self) -> int:
        """Bytes held now."""
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return _status("VmRSS") or 0

    def peak(self) -> int:
        """The most bytes held since `reset_peak`, or since the process began; on a GPU a run counts anew at each step that it
        logs, and tells the figure there (`peak_memory_bytes`)."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _status("VmHWM") or 0

    def reset_peak(self) -> None:
        """Let the peak count from now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError), open(f"{PROCESS}/clear_refs", "w", encoding="ascii") as file:
                file.write("5")

    @contextmanager
    def memory_profiling(self, name: str) -> Iterator[dict[str, float]]:
        """Around a stretch of code: afterwards its figures are printed, and in `stats` and in what this gives."""
        figures: dict[str, float] = {}
        self.reset_peak()
        before, began = self.used(), time.perf_counter()
        try:
            yield figures
        finally:
            after = self.used()
            peak = max(self.peak(), after)
            figures.update(before=before, after=after, peak=peak, seconds=time.perf_counter() - began)
            self.stats[name] = figures
            print(
                f"{name}: {size_text(before)} before, {size_text(after)} after, peak {size_text(peak)} ({self.device})",
                file=sys.stderr,
            )

    def log_memory_usage(self, label: str = "memory") -> int:
        """Print what is held now, and return it in bytes."""
        used = self.used()
        print(f"{label}: {size_text(used)} held, peak {size_text(self.peak())} ({self.device})", file=sys.stderr)
        return used


def _status(key: str) -> int | None:
    """A figure of Linux for this process, in bytes; None elsewhere."""
    try:
        with open(f"{PROCESS}/status", encoding="ascii") as file:
            found = next((line for line in file if line.startswith(f"{key}:")), None)
    except OSError:
        return None
    return int(found.split()[1]) * 1024 if found else None
