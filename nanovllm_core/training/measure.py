"""What a run measures of itself: speed, utilisation, memory, and where a step's time goes.

Phases are marked as they begin; each lasts until the next mark. They are timed over the logged steps alone, each from the
moment when the loss of the step before was known, so `optimizer` is the update of the step before and the gradients' norm in
this one (a process's first step has no update before it). On a GPU marks are events in its stream, read when the step's loss
has been: they are over then, and nothing waits for the update that is queued behind them. They tell what the device was at:
`data` is how long it had no work, not how long the host took. On a CPU they are the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from nanovllm_core.contracts import Step
from nanovllm_core.training.flops import Flops
from nanovllm_core.training.profiling import PHASES, Profile

Mark = Any  # on a CPU a float, on a GPU a torch.cuda.Event


class Meter:
    """Told by the loop what begins; gives a logged step's figures.

    On a GPU it lets torch's peak of allocated memory begin anew with each.

    flops, peak: of the model, and FLOP/s of all ranks' devices together; without either there is no MFU
    """

    def __init__(
        self, device: str, flops: Flops | None = None, peak: float | None = None, profile: Profile | None = None
    ) -> None:
        self.on_gpu, self.flops, self.peak, self.profile = device == "cuda", flops, peak, profile
        self.timed = False
        self.marks: list[tuple[str, Mark]] = []  # what began, and when
        self.over: list[tuple[str, Mark]] = []  # of the newest timed step
        self.start()

    def start(self) -> None:
        """What is measured counts from now."""
        self.began, self.held = time.perf_counter(), 0.0
        self.tokens, self.mine, self.work = 0, 0, 0  # of all ranks; of this one, and its FLOPs
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def begin(self, step: int, logged: bool) -> None:
        """A step begins, with its data."""
        if self.profile is not None:
            with self.paused():
                self.profile.begin(step)
        self.timed |= logged
        self.phase("data")

    def phase(self, name: str) -> None:
        """One of PHASES begins; "": none."""
        if self.profile is not None:
            self.profile.phase(name)
        if self.timed:
            self.marks.append((name, self._now()))

    def read(self, next_logged: bool) -> None:
        """The step's loss is on its way to the host. The next step is timed from here, if it is logged."""
        if self.timed or next_logged:
            now = self._now()
            if self.timed:
                self.over = [*self.marks, ("", now)]
            self.marks, self.timed = [("optimizer", now)], next_logged

    def end(self, data: Step) -> None:
        """The step is over."""
        self.phase("")
        self.tokens += data.tokens
        if self.flops is not None and self.peak is not None:
            for micro in data.micro_batches:
                self.mine += sum(micro.batch.lengths)
                self.work += self.flops.of(micro.batch.lengths)
        if self.profile is not None:
            with self.paused():
                self.profile.end()

    def close(self) -> dict[str, float]:
        """Figures since the last call; evaluation and saving do not count. Utilisation takes this rank's documents for all."""
        speed = self.tokens / max(1e-9, time.perf_counter() - self.began - self.held)
        found = {"tokens_per_second": speed}
        if self.mine and self.peak is not None:
            found["mfu"] = speed * self.work / self.mine / self.peak
        found |= self._memory() | (_sums(self.over) if self.over else {})
        self.start()
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place within does not count."""
        began = time.perf_counter()
        yield
        self.held += time.perf_counter() - began

    def _now(self) -> Mark:
        if not self.on_gpu:
            return time.perf_counter()
        event: Mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event

    def _memory(self) -> dict[str, float]:
        """The most bytes that were allocated on the GPU; of a CPU the most that the process ever held."""
        if self.on_gpu:
            return {"peak_memory_bytes": torch.cuda.max_memory_allocated()}
        try:
            import resource
        except ImportError:  # Windows
            return {}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _sums(marks: list[tuple[str, Mark]]) -> dict[str, float]:
    """Seconds of each phase; the last mark ends the one before."""
    sums, on_clock = dict.fromkeys(PHASES, 0.0), isinstance(marks[-1][1], float)
    if not on_clock:
        marks[-1][1].synchronize()  # microseconds: the host has waited for what is queued before it
    for (name, mark), (_, after) in pairwise(marks):
        if name:
            sums[name] += after - mark if on_clock else mark.elapsed_time(after) / 1e3
    return {f"seconds_{name}": value for name, value in sums.items()}
