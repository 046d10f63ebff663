"""What a person sees of a run: a moving bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.options import above

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from nanovllm_core.plan import Plan

QUIET = 2.0  # seconds between plain lines of one phase


@define
class _Screen:
    """The one mutable thing: where the cursor is, and since when."""

    console: Console | None = None
    bar: Bar | None = None
    task: Any = None
    phase: str = ""
    began: float = 0.0
    spoke: float = 0.0
    last_step: int = 0
    pace: float = 0.0  # seconds a step, lately


@frozen(kw_only=True, eq=False)
class Progress:
    """Shows each phase with rate and time left: a bar on a terminal, plain lines elsewhere.

    every: seconds between plain lines of one phase (training prints each logged step)
    """

    every: float = field(default=QUIET, validator=above(0))
    _screen: _Screen = field(factory=_Screen, init=False, repr=False)

    @hookimpl
    def run_started(self, plan: Plan) -> None:
        from rich.console import Console

        s = self._screen
        s.console = Console(highlight=False, emoji=False) if plan.machine.rank == 0 else None
        shape = plan.model.shape
        self._say(
            f"{plan.model.model.entry.name} model: {shape.family}, {shape.parameters:,} parameters "
            f"({shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocab_size:,}), "
            f"{plan.model.dtype} on {plan.machine.device}"
        )
        self._say(f"vocabulary {plan.model.vocabulary.value:,}: {plan.model.vocabulary.why}")

    @hookimpl
    def note(self, text: str) -> None:
        self._say(text)

    @hookimpl
    def phase_progress(self, phase: str, done: int, total: int, unit: str) -> None:
        s, now = self._screen, time.monotonic()
        if s.phase != phase:
            self._close()
            s.phase, s.began, s.spoke = phase, now, now
        rate = done / max(1e-9, now - s.began)
        if self._bar():
            self._move(phase, done, total, f"{_amount(rate, unit)}/s")
        elif now - s.spoke >= self.every and done < total:
            s.spoke = now
            self._say(
                f"{phase}: {done / max(1, total):4.0%}  {_amount(rate, unit)}/s  {_clock((total - done) / max(rate, 1e-9))} left"
            )
        if done >= total:
            self._close()
            self._say(f"{phase}: {_amount(total, unit)} in {now - s.began:.1f} s")
            s.phase = ""

    @hookimpl
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        s, now, total = self._screen, time.monotonic(), int(metrics["total_steps"])
        if s.phase == "evaluating":  # did not count
            s.phase = "training"
        elif s.phase != "training":
            s.phase, s.pace = "training", 0.0
        else:
            lately = (now - s.spoke) / max(1, step - s.last_step)
            s.pace = (s.pace + lately) / 2 if s.pace else lately
        s.spoke, s.last_step = now, step
        clock = _clock(s.pace * (total - step)) if s.pace or step == total else "?"
        mfu = f"  MFU {100 * metrics['mfu']:.1f} %" if "mfu" in metrics else ""
        told = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  epoch {metrics['epoch']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s{mfu}"
        )
        if self._bar():
            self._move("training", step, total, told)
        else:
            self._say(f"step {step}/{total}  {told}  {clock} left")
        if step >= total:
            self._close()

    @hookimpl
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._say(
            f"held-out documents at step {step}: loss {metrics['eval_loss']:.4f}  perplexity "
            f"{metrics['eval_perplexity']:,.2f}  {metrics['eval_bits_per_byte']:.4f} bits per byte"
        )

    @hookimpl
    def checkpoint_saved(self, step: int, path: Path) -> None:
        self._say(f"saved {path.name}")

    @hookimpl
    def generated(self, prompt: str, text: str) -> None:
        self._say(f"\n--- {prompt!r} continues:\n{text}\n---")

    @hookimpl
    def run_finished(self, output_dir: Path) -> None:
        self._close()
        self._say(f"the model is in {output_dir}: `nanovllm generate {output_dir} --prompt ...`")

    def _say(self, text: str) -> None:
        if self._screen.console is not None:
            self._screen.console.print(text, markup=False, soft_wrap=True)

    def _bar(self) -> bool:
        return self._screen.console is not None and self._screen.console.is_terminal

    def _move(self, phase: str, done: int, total: int, told: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        s = self._screen
        if s.bar is None:
            count = MofNCompleteColumn() if phase == "training" else TextColumn("{task.percentage:>3.0f}%")
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                count,
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            s.bar = Bar(*columns, console=s.console, transient=True)
            s.bar.start()
            s.task = s.bar.add_task(phase, total=total, told="")
        s.bar.update(s.task, completed=done, told=told)

    def _close(self) -> None:
        if self._screen.bar is not None:
            self._screen.bar.stop()
            self._screen.bar = None


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"
    return f"{value:,.0f} {unit}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
