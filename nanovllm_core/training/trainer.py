"""The training loop: micro-batches in, optimizer steps out, with what must be said and saved along the way.

The loss of a step is the sum over every trained token of all its micro-batches on all ranks, divided by their number:
accumulation, world size and packing change the arithmetic's order, never its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

import torch
from attrs import asdict, evolve, fields_dict, frozen

from nanovllm_core.contracts import Parallelized, Step
from nanovllm_core.errors import TrainingError
from nanovllm_core.training.best import Best, Patience
from nanovllm_core.training.checkpoint import random_state
from nanovllm_core.training.evaluate import Evaluation, evaluate
from nanovllm_core.training.figures import Figures
from nanovllm_core.training.freezing import Freezing, freeze_until
from nanovllm_core.training.guard import BadSteps, Guard
from nanovllm_core.training.measure import Meter
from nanovllm_core.training.optimizer import adamw
from nanovllm_core.training.recompute import recompute_blocks
from nanovllm_core.training.schedule import Schedule
from nanovllm_core.training.sharding import of_all_ranks
from nanovllm_core.training.stop import StopRequest
from nanovllm_core.training.watch import At

T = TypeVar("T")


@frozen(kw_only=True)
class Settings:
    """What the loop needs to know; lengths in optimizer steps."""

    schedule: Schedule
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    clipping: float
    logging_steps: int
    eval_steps: int
    save_steps: int
    gradient_checkpointing: bool | Literal["selective"] = False
    freezing: Freezing = Freezing()
    bad_steps: BadSteps = BadSteps()
    patience: Patience | None = None

    @property
    def total_steps(self) -> int:
        return self.schedule.total


class Steps(Protocol):
    """The data of a run, by position: how many sequences have been consumed."""

    def step(self, position: int) -> Step:
        """The step that begins there."""
        ...

    def sources(self, position: int) -> Iterable[str]:
        """Names of what that step's documents come from."""
        ...


class Stops(Protocol):
    """A wish that the run ends, looked at between items (`StopRequest`)."""

    def checked(self, items: Iterable[T]) -> Iterator[T]: ...


class Events(Protocol):
    """Whom the loop tells (the callbacks' hooks)."""

    def note(self, text: str) -> None: ...

    def phase_progress(self, phase: str, done: int, total: int, unit: str) -> None: ...

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated_by_source(self, step: int, table: list[dict[str, Any]]) -> None: ...


class Trainer:
    """Runs `settings.total_steps` optimizer steps; `step` and `position` say how far it is."""

    def __init__(
        self,
        model: Parallelized,
        steps: Steps,
        settings: Settings,
        events: Events,
        evaluation: Evaluation | None,
        stop: Stops | None = None,
        at: At = lambda doing, alone=False: None,
        meter: Meter | None = None,
    ) -> None:
        self.at = at  # told what begins that other ranks wait for
        device = next(p.device.type for _, p in model.module.named_parameters())
        self.meter, self.reads_ahead = meter or Meter(device), device == "cuda"
        self.stop: Stops = stop or StopRequest()
        self.model, self.steps, self.settings, self.events, self.evaluation = model, steps, settings, events, evaluation
        if settings.patience is not None and evaluation is None:
            raise TrainingError(
                "train.early_stopping_patience: nothing is evaluated (data.eval_fraction is 0, or there is a single "
                "document), so there is nothing to stop by; leave it out or hold documents out"
            )
        self.step, self.position = 0, 0
        self.ahead: tuple[int, Step] | None = None  # a position, and the step read for it
        self.evaluated = False  # the held-out figures are of this step
        self.random = random_state()  # after this step: a step that is abandoned may have drawn from it
        self.metrics: dict[str, float] = {}  # the newest held-out figures
        self.before: dict[str, float] = {}  # those before the first step
        self.best, self.guard = Best(), Guard(settings.bad_steps)
        self.trained_from: dict[str, int] = {}  # parameters that may be frozen -> first step (0-based) that trains them
        if settings.freezing:
            self.trained_from = settings.freezing.trained_from(model.module, settings.total_steps)
        if settings.gradient_checkpointing:
            recompute_blocks(model.module, every=2 if settings.gradient_checkpointing == "selective" else 1)
        self.optimizer = adamw(
            model.module.named_parameters(),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
        )

    def run(self, save: Callable[[Trainer], None], tick: Callable[[], None] = lambda: None) -> None:
        """Train to the end. `save` is called every `save_steps`, after each best evaluation so far and after the last step,
        `tick` after each.

        Held-out figures are made every `eval_steps` and before each save. Raises Interrupted when `stop` is asked, with
        the state of the last whole step: a step or an evaluation that was begun is as if it had not been.
        """
        s = self.settings
        self.model.module.train(True)
        if self.step == 0 and not self.evaluated:
            self.evaluate()
            self.before = self.metrics
        elif not self.evaluated and self._due(self.step):  # interrupted before it was made
            self._is_enough()
        self.meter.start()
        while self.step < s.total_steps and not self.best.exhausted(s.patience):
            self._thaw()
            self.meter.begin(self.step + 1, self._logged(self.step + 1))
            data = self._data(self.position)
            metrics = self._optimize(data)
            self.at(f"after step {self.step + 1}", alone=True)
            self.step, self.position, self.evaluated = self.step + 1, data.next_position, False
            self.random = random_state()
            self.meter.end(data)
            last = self.step == s.total_steps
            if metrics and self._logged(self.step):
                metrics |= {**self.meter.close(), "epoch": data.epoch, "total_steps": s.total_steps}
                self.events.step_done(step=self.step, metrics=metrics)
            with self.meter.paused():
                if self._due(self.step):
                    last |= self._is_enough()
                if last or self.step % s.save_steps == 0 or self.best.step == self.step:
                    self.at(f"saving after step {self.step}", alone=True)
                    save(self)
                tick()

    def _data(self, position: int) -> Step:
        """The step that begins there, read already or not."""
        at, step = self.ahead or (-1, None)
        self.ahead = None
        return step if step is not None and at == position else self.steps.step(position)

    def _read_ahead(self, position: int) -> None:
        """The next step's data, while the device is at work (a CPU has no time to spare)."""
        if self.reads_ahead and self.step + 1 < self.settings.total_steps:
            self.at(f"reading step {self.step + 2}", alone=True)
            with suppress(Exception):  # it is read again when its turn comes, and raises then: this step is whole
                self.ahead = position, self.steps.step(position)

    def _logged(self, step: int) -> bool:
        """Whether this step's figures are told."""
        return step % self.settings.logging_steps == 0 or step in (1, self.settings.total_steps)

    def _due(self, step: int) -> bool:
        """Whether the held-out documents are measured after this step."""
        s = self.settings
        return step >= s.total_steps or step % s.eval_steps == 0 or step % s.save_steps == 0

    def evaluate(self) -> None:
        """Measure the held-out documents, if there are any, and tell."""
        if self.evaluation is not None:
            held_out = self.evaluation.batches
            heeded = evolve(self.evaluation, batches=lambda *part: self.stop.checked(self._told(held_out(*part))))
            self.metrics, table = evaluate(self.model, heeded)
            self.at(f"after evaluating step {self.step}", alone=True)
            self.evaluated = True
            self.events.evaluated(step=self.step, metrics=self.metrics)
            self.events.evaluated_by_source(step=self.step, table=table)

    def _told(self, turns: Iterable[T]) -> Iterator[T]:
        """The turns of an evaluation, each told of but for the last: the figures tell of that."""
        assert self.evaluation is not None
        total, size = self.evaluation.turns, self.model.data_size
        for i, turn in enumerate(turns):
            self.at(f"evaluating after step {self.step}, batch {i}")
            if 0 < i * size < total:
                self.events.phase_progress(phase="evaluating", done=i * size, total=total, unit="batches")
            yield turn

    def progress(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of the loop beside step, position and figures: plain data."""
        guard = {"skipped": self.guard.skipped, "row": self.guard.row, "losses": list(self.guard.losses)}
        return {"best": asdict(self.best), "guard": guard}

    def resume(self, progress: Mapping[str, Any], *, longer: bool) -> None:
        """Go on from a checkpoint's `progress`, its optimizer state loaded. Over a `longer` run patience begins anew.

        What was trained before stays so, even where a longer run would thaw it later.
        """
        self.best = Best(**{k: v for k, v in progress.get("best", {}).items() if k in fields_dict(Best)})
        guard = progress.get("guard", {})
        self.guard.skipped, self.guard.row = guard.get("skipped", 0), guard.get("row", 0)
        self.guard.losses.extend(guard.get("losses", ()))
        if longer:
            self.best.waited = 0
        for name, parameter in self.model.module.named_parameters():
            if self.trained_from.get(name) and parameter in self.optimizer.state:
                self.trained_from[name] = 0

    def _is_enough(self) -> bool:
        """Evaluate; whether the run ends here because nothing gets better."""
        self.evaluate()
        patience = self.settings.patience
        if self.evaluation is not None:
            self.best.hear(self.step, self.metrics["eval_loss"], patience.min_delta if patience else 0.0)
        if not self.best.exhausted(patience):
            return False
        self.events.note(
            text=f"stopping after {self.step} of {self.settings.total_steps} steps: {self.best.waited} evaluations without a "
            f"better eval_loss (train.early_stopping_patience); the best was {self.best.eval_loss:.4f} at step {self.best.step}"
        )
        return True

    def _thaw(self) -> None:
        if not self.trained_from:
            return
        thawed = freeze_until(self.model.module, self.trained_from, self.step)
        if thawed:
            more = f", ..., {thawed[-1]}" if len(thawed) > 1 else ""
            self.events.note(text=f"step {self.step + 1}: {len(thawed)} parameters thaw: {thawed[0]}{more}")

    def _optimize(self, data: Step) -> dict[str, float]:
        """One optimizer step: its figures; none where the step is left out."""
        s, model = self.settings, self.model
        learning_rate = s.learning_rate * s.schedule.share(self.step)
        losses = []
        self.at(f"step {self.step + 1}")
        for i, micro in enumerate(self.stop.checked(data.micro_batches), 1):
            self.at(f"step {self.step + 1}, micro-batch {i}")
            with model.micro_batch(last=i == len(data.micro_batches)):
                self.meter.phase("forward")
                loss = model(micro.tokens, micro.batch, micro.targets) / max(1, data.trained)
                self.meter.phase("backward")
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            losses.append(loss.detach())
        self.at(f"step {self.step + 1}, the optimizer")
        self.meter.phase("optimizer")
        told = of_all_ranks(model, torch.stack(losses))
        norm = model.clip(0).to(told.device, torch.float32)
        figures = Figures(told, norm)
        self.meter.read(self._logged(self.step + 2))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        divisor = (norm / s.clipping).clamp(min=1.0) if s.clipping > 0 else torch.ones_like(norm)
        judged_here = s.bad_steps.spike_factor is not None  # else the device itself leaves out what is not finite
        if not judged_here:
            self.optimizer.update(divisor, figures.not_finite, seed=self.step)
        self._read_ahead(data.next_position)
        self.at(f"step {self.step + 1}, its figures")
        value, length = figures.read()
        bad = self.guard.accept(value, length)
        if judged_here:
            self.optimizer.update(divisor, torch.full_like(divisor, float(bool(bad))), seed=self.step)
        self.optimizer.zero_grad()
        if bad:
            self.events.note(text=self.guard.deal(self.step + 1, bad, self.steps.sources(self.position)))
            return {}
        skipped = {"skipped_steps": self.guard.skipped} if self.guard.skipped else {}
        return {"loss": value, "learning_rate": learning_rate, "gradient_norm": length, **skipped}
