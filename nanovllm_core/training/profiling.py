"""`--profile`: a few steps under torch's profiler, as a trace to look at and as a table by phase.

What is profiled is the same arithmetic, some slower; the time that starting, stopping and writing take does not count in
the run's figures. A kernel belongs to the phase in which the host launched it, from whichever thread: kernels of `backward`
are launched by autograd's. Where streams overlap, the sum of kernels is more than the time that passed.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nanovllm_core.files import replace_text, writing

PHASES = ("data", "forward", "backward", "optimizer")
MARK = "nanovllm: "  # before a phase's name in the trace
ELSEWHERE = "elsewhere"  # evaluation and saving between two steps
FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "phases.txt"
FIRST, LAST = 4, 6  # of the steps that are left: before them caches fill and kernels are compiled
COSTLIEST = 25
LAUNCHES = ("cuda_runtime", "cuda_driver")  # kinds of a trace's events
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
NOISE = re.compile(r"^void |at::native::|c10::|\(anonymous namespace\)::")  # of the names of torch's own kernels

Cost = tuple[float, int]  # us, calls


class Profile:
    """Steps 4 to 6 of those that are left, or the last of fewer. A context: what is left open at its end is written then.

    root: the files go to `profile/` there
    tell: hears where they are
    """

    def __init__(self, root: Path, tell: Callable[[str], None], *, device: str, done: int, total: int) -> None:
        self.root, self.tell, self.device = root, tell, device
        self.first, self.last = (done + min(n, total - done) for n in (FIRST, LAST))
        self.profiler: profile | None = None  # while it is under way
        self.mark: record_function | None = None
        self.done = self.step = done

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        if step == self.first:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.profiler.start()

    def phase(self, name: str) -> None:
        """One of PHASES begins; "": none."""
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
            self.mark = None
        if self.profiler is not None and name:
            self.mark = record_function(f"{MARK}{name}")
            self.mark.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def end(self) -> None:
        """The step is over."""
        if self.step == self.last:
            self._finish()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.phase("")
        if kind is not None:
            if self.profiler is not None:
                self.profiler.stop()
        elif self.step < self.first:
            self.tell(f"nothing was profiled: the run ended before its step {self.first}")
        elif self.last <= self.done:
            self.tell("nothing was profiled: there was no step left to train")
        else:
            self._finish()

    def _finish(self) -> None:
        """Stop, and write what was seen."""
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            return
        profiler.stop()
        count, folder = self.step - self.first + 1, self.root / FOLDER
        told = f"step {self.step}" if count == 1 else f"steps {self.first} to {self.step}"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            partial = folder / f".partial.{TRACE}"
            profiler.export_chrome_trace(str(partial))
            with gzip.open(partial, "rt", encoding="utf-8", errors="replace") as file:
                trace = json.load(file)["traceEvents"]
            os.replace(partial, folder / TRACE)
            operators = {
                e.key: (e.self_cpu_time_total, e.count) for e in profiler.key_averages() if not e.is_user_annotation
            }
            replace_text(folder / TABLE, f"{told} on {self.device}\n\n{table(trace, operators, count)}")
        self.tell(f"profiled {told}: {folder / TABLE} and {folder / TRACE} (open it with https://ui.perfetto.dev)")


def table(trace: Iterable[Mapping[str, Any]], operators: Mapping[str, Cost], steps: int) -> str:
    """Time by phase and what costs most, of a trace of so many steps; `operators`: what is the host's own time in each."""
    host, device = dict.fromkeys(PHASES, 0.0), dict.fromkeys((*PHASES, ELSEWHERE), 0.0)  # us
    spans, launched, ran = list[tuple[float, float, str]](), dict[int, float](), list[Mapping[str, Any]]()
    for e in trace:
        kind, name = e.get("cat"), e.get("name", "")
        if kind == "user_annotation" and name.startswith(MARK):
            spans.append((e["ts"], e["ts"] + e["dur"], phase := name.removeprefix(MARK)))
            host[phase] += e["dur"]
        elif kind in LAUNCHES and "correlation" in e.get("args", {}):
            launched[e["args"]["correlation"]] = e["ts"]
        elif kind in KERNELS:
            ran.append(e)
    kernels: dict[str, Cost] = {}
    for e in ran:
        begun = launched.get(e["args"].get("correlation"), -1.0)
        device[next((phase for since, until, phase in spans if since <= begun <= until), ELSEWHERE)] += e["dur"]
        time, calls = kernels.get(e["name"], (0.0, 0))
        kernels[e["name"]] = (time + e["dur"], calls + 1)
    columns = {"host": host, "kernels": device} if kernels else {"host": host}
    lines = ["milliseconds a step", "", f"{'phase':12}" + "".join(f"{name:>12}" for name in columns)]
    for name in device if kernels else host:
        lines.append(f"{name:12}" + "".join(f"{c.get(name, 0.0) / 1e3 / steps:12.3f}" for c in columns.values()))
    lines.append(f"{'all':12}" + "".join(f"{sum(c.values()) / 1e3 / steps:12.3f}" for c in columns.values()))
    if kernels:
        lines += ["", f"{COSTLIEST} kernels that cost most", "", *_costliest(kernels, steps)]
    lines += ["", f"{COSTLIEST} operators that cost the host most, by themselves", "", *_costliest(operators, steps)]
    return "\n".join(lines) + "\n"


def _costliest(costs: Mapping[str, Cost], steps: int) -> Iterator[str]:
    whole = sum(time for time, _ in costs.values()) or 1.0
    yield f"{'ms a step':>12}{'share':>8}{'calls a step':>14}  name"
    for name, (time, calls) in sorted(costs.items(), key=lambda item: -item[1][0])[:COSTLIEST]:
        short = NOISE.sub("", " ".join(name.split()))[:110]
        yield f"{time / 1e3 / steps:12.3f}{time / whole:8.1%}{calls / steps:14.1f}  {short}"
