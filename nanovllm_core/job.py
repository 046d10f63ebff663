"""The part of a run that has a model: train or go on, save on the way, export, answer the recipe's prompts."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from attrs import evolve

from nanovllm_core.assemble import assemble, models_of, opened
from nanovllm_core.contracts import Layout, Module
from nanovllm_core.corpus import Corpus, batches
from nanovllm_core.errors import CheckpointError, Interrupted
from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.machine import host_memory
from nanovllm_core.output import BEST, finished, mark_finished
from nanovllm_core.plan import Plan
from nanovllm_core.samples import Samples
from nanovllm_core.settings import settings_of
from nanovllm_core.training import checkpoint
from nanovllm_core.training.deterministic import deterministically
from nanovllm_core.training.export import export, write_config
from nanovllm_core.training.flops import flops_of, peak_of
from nanovllm_core.training.measure import Meter
from nanovllm_core.training.parts import ALONE, load_optimizer, snapshot
from nanovllm_core.training.profiling import Profile
from nanovllm_core.training.saver import Saver, room_needed
from nanovllm_core.training.sharding import full_state
from nanovllm_core.training.stop import StopRequest
from nanovllm_core.training.together import Together
from nanovllm_core.training.trainer import Settings, Trainer
from nanovllm_core.training.watch import At
from nanovllm_core.training.world import World
from nanovllm_core.weights import ModelFolder

Found = tuple[Path, checkpoint.State]


def asked_length(plan: Plan) -> dict[str, Any]:
    """How long the recipe asks to train."""
    keys = ["num_train_epochs", "max_steps"]
    if plan.recipe.train.early_stopping_patience is not None:
        keys += ["early_stopping_patience", "early_stopping_min_delta"]
    return {key: getattr(plan.recipe.train, key) for key in keys}


def say_finished(events: Callbacks, steps: int, folder: Path) -> None:
    """Tell that there is nothing to do, and what can be done."""
    events.note(
        text=f"this run is finished ({steps} steps) and nothing is done again; `nanovllm generate {folder} --prompt ...` "
        "answers other prompts, a higher train.num_train_epochs or train.max_steps goes on"
    )


class Job:
    """One run's model, from assembly to answers."""

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        identity: str,
        events: Callbacks,
        stop: StopRequest,
        world: World = ALONE,
        at: At = lambda doing, alone=False: None,
        profile: bool = False,
    ) -> None:
        self.plan, self.corpus, self.identity, self.events, self.stop = plan, corpus, identity, events, stop
        self.world, self.at, self.profiled = world, at, profile and world.first
        self.folder, self.shape = plan.output_dir, plan.model.shape
        self.config = models_of(plan.model).config(shape=self.shape)
        self.samples = Samples(plan, corpus.tokenizer, events, stop)  # or say before training what cannot be answered

    def run(self, found: Found | None) -> None:
        """Everything that is left to do. Raises Interrupted when it was asked to stop, with the state saved."""
        state = found[1] if found else None
        if state is not None and state.tokenizer != self.corpus.tokenizer.fingerprint:
            raise CheckpointError(
                f"{self.folder}: checkpoint-{state.step} was trained with another vocabulary than the tokenizer component "
                "makes of the same documents now; was it updated? Install the version that the checkpoint was made with, "
                "or name another output_dir to begin anew"
            )
        trainer, settings = self.trainer(found)
        done = finished(self.folder)
        if state is not None and state.step >= settings.total_steps and done is not None and done[0] == state.step:
            say_finished(self.events, state.step, self.folder)
            return
        if state is not None:
            self.say_going_on(state, trainer, settings)
        saver = self.train(trainer, found)
        if "eval_perplexity" in trainer.before and "eval_perplexity" in trainer.metrics:
            self.events.note(
                text=f"held-out perplexity: {trainer.before['eval_perplexity']:,.2f} before, "
                f"{trainer.metrics['eval_perplexity']:,.2f} after"
            )
        self.at("making the model whole", alone=self.world.first)  # together, and written by the first rank
        weights = full_state(trainer.model.module)
        if not self.world.first:
            for _ in weights:
                pass
            return
        files = export(self.folder, weights, self.config, self.corpus.tokenizer, self.shape.dtype)
        self.export_best(saver, trainer)
        module = trainer.model.module if self.world.size == 1 else self.reopened()
        if module is not None:
            self.samples.of_the_finished(module, trainer.step)
        mark_finished(self.folder, trainer.step, asked_length(self.plan), files)

    def say_going_on(self, state: checkpoint.State, trainer: Trainer, settings: Settings) -> None:
        """Tell where a resumed run stands."""
        self.events.note(text=f"going on from checkpoint-{state.step}")
        if state.step >= settings.total_steps and state.step < state.total_steps:
            self.events.note(
                text=f"the recipe asks for {settings.total_steps} steps and {state.step} are done: the model is exported as "
                "it is"
            )
            trainer.evaluated = False  # the saved figures may be older than the weights
        elif state.total_steps != settings.total_steps:
            self.events.note(
                text=f"the learning rate's schedule is laid out anew over {settings.total_steps} steps "
                f"(it was {state.total_steps})"
            )

    def trainer(self, found: Found | None) -> tuple[Trainer, Settings]:
        """The model with its weights, and the loop, where the run stands."""
        if self.plan.recipe.train.deterministic:
            deterministically(self.plan.machine.device)
        plan, train = self.plan, self.plan.recipe.train
        saved = ModelFolder.open(found[0]) if found else None
        model = assemble(
            plan.model, plan.machine.device, seed=train.seed, training=True, weight=saved.tensor if saved else None,
            mesh=self.world.mesh(plan.model.layout, plan.machine.device),
        )  # fmt: skip
        rows = plan.sequences_per_step.value
        data = batches(plan, self.corpus, rows, model.data_rank, model.data_size)
        position = found[1].position if found else 0
        done = found[1].step if found else 0
        left = 0 if data.total is None else max(0, -(-(data.total - position) // rows))
        total = train.max_steps or done + left
        settings = settings_of(train, total)
        if settings.schedule.warmup >= total:
            self.events.note(
                text=f"train.warmup_steps is {settings.schedule.warmup} and the run has {total} steps: the learning rate never "
                f"reaches {train.learning_rate}"
            )
        checkpoint.seed_random_state(train.seed + self.world.rank)  # dropout draws from it, where a model has any
        stop = self.stop if self.world.size == 1 else Together(self.world, lambda: self.stop.asked)
        trainer = Trainer(
            model, data, settings, self.events, self.corpus.evaluation, stop, self.at, self.meter(done, total)
        )
        if found:
            path, state = found
            load_optimizer(path, trainer.optimizer, model.module.named_parameters(), trainer.trained_from)
            if len(state.random) == self.world.size:
                checkpoint.set_random_state(state.random[self.world.rank])
            else:  # as many ranks saved it as there are not now
                checkpoint.seed_random_state((train.seed + (state.step << 32) + self.world.rank) % 2**63)
            trainer.random = checkpoint.random_state()
            trainer.step, trainer.position, trainer.evaluated = state.step, state.position, state.evaluated
            trainer.metrics, trainer.before = state.metrics, state.before
            trainer.resume(state.progress, longer=total > state.total_steps)
        return trainer, settings

    def meter(self, done: int, total: int) -> Meter:
        """What measures the run from step `done` on, and profiles some of it where that was asked."""
        machine, profile = self.plan.machine, None
        known = peak_of(machine.device_name) if self.plan.model.dtype == "bfloat16" else None
        if self.profiled:
            tell = lambda text: self.events.note(text=text)  # noqa: E731
            profile = Profile(self.folder, tell, device=machine.device_name, done=done, total=total)
        return Meter(machine.device, flops_of(self.shape), known and known * self.world.size, profile)

    def train(self, trainer: Trainer, found: Found | None) -> Saver:
        """Train to the end, or until asked to stop, saving beside it."""
        plan, left = self.plan, trainer.settings.total_steps - trainer.step
        saver = Saver(
            root=self.folder,
            limit=plan.recipe.train.save_total_limit,
            write_rest=lambda partial: write_config(partial, self.config, self.corpus.tokenizer, plan.model.weights),
            saved=lambda step, path: self.events.checkpoint_saved(step=step, path=path),
            free=lambda: host_memory() // self.world.local_size,
            resumed=found[0] if found else None,
            world=self.world,
        )
        size = 3 * (4 if plan.model.weights == "float32" else 2) * self.shape.parameters  # weights and two moments
        exported = (4 if self.shape.dtype == "float32" else 2) * self.shape.parameters
        saves = -(-max(0, left) // trainer.settings.save_steps)
        if self.world.first:
            room_needed(self.folder, size=size, exported=exported, limit=saver.limit, saves=saves)

        def save(trainer: Trainer) -> None:
            named = trainer.model.module.named_parameters
            held = lambda copy: snapshot(named(), trainer.optimizer, copy, self.world)  # noqa: E731
            saver.save(self.state(trainer), held, size // self.world.size)

        def tick() -> None:
            saver.poll()
            over = trainer.step >= trainer.settings.total_steps or trainer.best.exhausted(trainer.settings.patience)
            if self.world.first and not over and self.samples.due(trainer.step):
                self.at(f"answering the prompts after step {trainer.step}", alone=True)
                self.samples.on_the_way(trainer.model.module, trainer.step)

        self.samples.begin()
        try:
            with self.stop.heeding(), trainer.meter.profile or nullcontext():
                trainer.run(save, tick)
        except Interrupted:
            self.stop.saving = True
            self.at(f"saving after step {trainer.step}", alone=True)
            saver.finish()
            trainer.optimizer.zero_grad()
            if trainer.step > saver.saved_step:
                save(trainer)
            saver.finish()
            raise
        except BaseException:
            saver.settle()
            raise
        saver.finish()
        return saver

    def state(self, trainer: Trainer) -> checkpoint.State:
        """Where the run stands, as a checkpoint keeps it."""
        return checkpoint.State(
            step=trainer.step,
            position=trainer.position,
            total_steps=trainer.settings.total_steps,
            identity=self.identity,
            tokenizer=self.corpus.tokenizer.fingerprint,
            metrics=trainer.metrics,
            before=trainer.before,
            random=[trainer.random],
            evaluated=trainer.evaluated,
            progress=trainer.progress(),
        )

    def export_best(self, saver: Saver, trainer: Trainer) -> None:
        """Into `best/`, the model of the lowest held-out loss, where that is not the last one."""
        folder = self.folder / BEST
        if saver.best is None or saver.best == f"checkpoint-{trainer.step}":
            shutil.rmtree(folder, ignore_errors=True)
            return
        best = ModelFolder.open(self.folder / saver.best)
        weights = ((name, best.tensor(name)) for name in best.names())
        export(folder, weights, self.config, self.corpus.tokenizer, self.shape.dtype)
        self.events.note(
            text=f"the held-out loss was lowest at step {saver.best.partition('-')[2]} ({saver.best_loss:.4f}, now "
            f"{trainer.metrics.get('eval_loss', math.nan):.4f}): that model is in {folder}"
        )

    def reopened(self) -> Module | None:
        """The exported model on this rank's device alone; None, said so, where it may not fit or is not asked."""
        plan, needed = self.plan, self.shape.parameters * (4 if self.plan.model.dtype == "float32" else 2)
        if not plan.recipe.generate.prompts:
            return None
        if 0 < plan.machine.memory < 1.2 * needed:
            self.events.note(
                text=f"the prompts are left out: the model's {needed / 1e9:.1f} GB may not fit on one device beside training"
            )
            return None
        saved = ModelFolder.open(self.folder)
        alone = evolve(plan.model, layout=Layout())
        return opened(alone, plan.machine.device, saved.tensor)
