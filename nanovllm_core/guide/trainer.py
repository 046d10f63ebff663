"""`Trainer`: the guide's object over a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from nanovllm_core.errors import RecipeError
from nanovllm_core.guide.config import TrainingConfig
from nanovllm_core.guide.keys import complete
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.interrupt import Interrupt
from nanovllm_core.output import finished
from nanovllm_core.plan import Plan, make_plan
from nanovllm_core.registry import Registry
from nanovllm_core.runner import run
from nanovllm_core.training.checkpoint import read_state
from nanovllm_core.training.saver import pointed
from nanovllm_core.training.stop import StopRequest
from nanovllm_core.training.world import World


@frozen
class Result:
    """What `Trainer.train` gives."""

    output_dir: Path  # the finished model, which `LLM`, transformers and vLLM open
    steps: int
    metrics: Mapping[
        str, float
    ]  # the newest of the held-out documents and, where this process is the first rank, of training


class Trainer:
    """A training run by a TrainingConfig: `Trainer.from_pretrained(config).train()`."""

    def __init__(
        self, config: TrainingConfig, callbacks: Sequence[object] = (), registry: Registry | None = None
    ) -> None:
        """`callbacks`: instances with `@hookimpl` methods of `hookspecs.Callbacks`. Raises NanoError for what cannot run."""
        self.config, self.callbacks = config, callbacks
        complete(config.text())
        self._registry = registry or Registry.from_environment()
        self.plan: Plan = make_plan(config.recipe(), self._registry)

    @classmethod
    def from_pretrained(cls, config: TrainingConfig, **options: Any) -> Trainer:
        """To fine-tune `config.model_name_or_path`."""
        if config.train_from_scratch:
            raise RecipeError(
                "Trainer.from_pretrained: the configuration says train_from_scratch; use Trainer.from_scratch, or leave it out"
            )
        return cls(config, **options)

    @classmethod
    def from_scratch(cls, config: TrainingConfig, **options: Any) -> Trainer:
        """To train a new model of `config.model_size` from random weights."""
        if config.model_name_or_path is not None and not config.train_from_scratch:
            raise RecipeError(
                f"Trainer.from_scratch: the configuration names the pretrained {config.model_name_or_path!r}; use "
                "Trainer.from_pretrained, or leave model_name_or_path out"
            )
        return cls(config.changed(train_from_scratch=True), **options)

    def train(self, stop: StopRequest | None = None) -> Result:
        """Train to the end, export and measure. Called again after an interruption it goes on from the newest checkpoint.

        Ctrl-C, SIGTERM and `stop.ask()` save and raise Interrupted, which says how to go on.
        """
        world, stop = World.join(), stop or StopRequest()
        with ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                hint = "train() goes on from the newest checkpoint, if there is one"
                stack.enter_context(Interrupt(stop, hint, world)).begun = True
            return self._train(world, stop)

    def _train(self, world: World, stop: StopRequest) -> Result:
        figures = _Figures()
        if self.config.analyze_documents and world.first:
            try:
                self._analyze()
            except BaseException as e:
                world.fail(e)
                raise
        folder = run(self.plan, [*self.callbacks, figures], stop, world)
        done, latest = finished(folder), pointed(folder)
        saved = read_state(folder / latest).metrics if latest is not None else {}
        assert done is not None, "a run that returns has finished"
        return Result(folder, done[0], {**saved, **figures.metrics})

    def _analyze(self) -> None:
        from nanovllm_core.analyze import analyze_document_collection, table

        assert self.config.dataset_path is not None
        print(table(analyze_document_collection(self.config.dataset_path, registry=self._registry)), end="")


@define(eq=False)
class _Figures:
    """Keeps the newest figures of a run."""

    metrics: dict[str, float] = field(factory=dict)

    @hookimpl
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)

    @hookimpl
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)
