"""The training loop: micro-batches in, optimizer steps out, with what must be said and saved along the way.

The loss of a step is the sum over every trained token of all its micro-batches on all ranks, divided by their number:
accumulation, world size and packing change the arithmetic's order, never its meaning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from attrs import frozen

from nanovllm_core.contracts import MicroBatch, Parallelized, Step
from nanovllm_core.errors import TrainingError
from nanovllm_core.training.checkpoint import random_state
from nanovllm_core.training.evaluate import evaluate
from nanovllm_core.training.optimizer import adamw, rate
from nanovllm_core.training.stop import StopRequest


@frozen(kw_only=True)
class Settings:
    """What the loop needs to know; lengths in optimizer steps."""

    total_steps: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    schedule: str
    clipping: float
    logging_steps: int
    eval_steps: int
    save_steps: int


class Steps(Protocol):
    """The data of a run: `step(position)` gives the step that begins `position` sequences into it."""

    def step(self, position: int) -> Step: ...


class Events(Protocol):
    """Whom the loop tells (the callbacks' hooks)."""

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...


@frozen(kw_only=True)
class Evaluation:
    """Held-out batches, made anew for each evaluation."""

    batches: Callable[[], Iterable[MicroBatch]]
    text_bytes: int


class Trainer:
    """Runs `settings.total_steps` optimizer steps; `step` and `position` say how far it is."""

    def __init__(
        self,
        model: Parallelized,
        steps: Steps,
        settings: Settings,
        events: Events,
        evaluation: Evaluation | None,
        stop: StopRequest | None = None,
    ) -> None:
        self.stop = stop or StopRequest()
        self.model, self.steps, self.settings, self.events, self.evaluation = model, steps, settings, events, evaluation
        self.step, self.position = 0, 0
        self.evaluated = False  # the held-out figures are of this step
        self.random = random_state()  # after this step: a step that is abandoned may have drawn from it
        self.metrics: dict[str, float] = {}  # the newest held-out figures
        self.before: dict[str, float] = {}  # those before the first step
        self.optimizer = adamw(
            model.module.named_parameters(),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
        )

    def run(self, save: Callable[[Trainer], None], tick: Callable[[], None] = lambda: None) -> None:
        """Train to the end. `save` is called every `save_steps` and after the last step, `tick` after each.

        Held-out figures are made every `eval_steps` and before each save. Raises Interrupted when `stop` is asked, with
        the state of the last whole step: a step or an evaluation that was begun is as if it had not been.
        """
        s = self.settings
        self.model.module.train(True)
        if not self.evaluated and self._due(self.step):
            self.evaluate()
            if self.step == 0:
                self.before = self.metrics
        window = _Window()
        while self.step < s.total_steps:
            data = self.steps.step(self.position)
            loss, norm, learning_rate = self._optimize(data)
            self.step, self.position, self.evaluated = self.step + 1, data.next_position, False
            self.random = random_state()
            window.add(data)
            last = self.step == s.total_steps
            if self.step % s.logging_steps == 0 or self.step == 1 or last:
                metrics = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm, **window.close()}
                self.events.step_done(
                    step=self.step, metrics={**metrics, "epoch": data.epoch, "total_steps": s.total_steps}
                )
            with window.paused():
                if self._due(self.step):
                    self.evaluate()
                if last or self.step % s.save_steps == 0:
                    save(self)
                tick()

    def _due(self, step: int) -> bool:
        """Whether the held-out documents are measured after this step."""
        s = self.settings
        return step >= s.total_steps or step % s.eval_steps == 0 or step % s.save_steps == 0

    def evaluate(self) -> None:
        """Measure the held-out documents, if there are any, and tell."""
        if self.evaluation is not None:
            batches = self.stop.checked(self.evaluation.batches())
            self.metrics = evaluate(self.model, batches, self.evaluation.text_bytes)
            self.evaluated = True
            self.events.evaluated(step=self.step, metrics=self.metrics)

    def _optimize(self, data: Step) -> tuple[float, float, float]:
        s, model = self.settings, self.model
        learning_rate = s.learning_rate * rate(s.schedule, self.step, total=s.total_steps, warmup=s.warmup_steps)
        total: torch.Tensor | None = None
        for i, micro in enumerate(self.stop.checked(data.micro_batches), 1):
            with model.micro_batch(last=i == len(data.micro_batches)):
                loss = model.module(micro.tokens, micro.batch, targets=micro.targets) / max(1, data.trained)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None, "a step has at least one micro-batch"
        value = float(model.total(total))
        norm = float(model.clip(s.clipping))
        if not math.isfinite(value + norm):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {value} and the gradient norm {norm}; the weights were left as they "
                f"were. Lower train.learning_rate (now {s.learning_rate}) or lengthen train.warmup_steps, and run again: "
                "that is another run, which begins anew and moves what this one saved to previous/"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, norm, learning_rate


class _Window:
    """Speed since the last logged step; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.began, self.tokens, self.held = time.perf_counter(), 0, 0.0

    def add(self, data: Step) -> None:
        self.tokens += data.tokens

    def close(self) -> dict[str, float]:
        now = time.perf_counter()
        speed = self.tokens / max(1e-9, now - self.began - self.held)
        self.began, self.tokens, self.held = now, 0, 0.0
        return {"tokens_per_second": speed}

    def paused(self) -> _Window:
        return self

    def __enter__(self) -> None:
        self.stopped = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.held += time.perf_counter() - self.stopped
