"""Plan -> Run: documents, tokens, model, steps, checkpoints, export, generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm_core.assemble import assemble, models_of
from nanovllm_core.contracts import Parallelized
from nanovllm_core.corpus import Corpus, batches, count, phase, prepare
from nanovllm_core.errors import CheckpointError, RefusedError
from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.inference.generate import answerable, generate
from nanovllm_core.inference.sampling import SamplingParams
from nanovllm_core.lock import identity, lock_of, sequences_per_step
from nanovllm_core.output import TOKENS, claimed, finished, locked_by, mark_finished, settle, write_lock
from nanovllm_core.plan import Plan
from nanovllm_core.settings import settings_of
from nanovllm_core.training import checkpoint
from nanovllm_core.training.export import export, write_config
from nanovllm_core.training.trainer import Settings, Trainer
from nanovllm_core.weights import ModelFolder


def run(plan: Plan, callbacks: Sequence[object] = ()) -> Path:
    """Do what the plan says; the folder of the finished model.

    Callbacks are the recipe's, then these (instances with `@hookimpl` methods of `hookspecs.Callbacks`). The same run
    again goes on from its newest sound checkpoint, or, when it is finished, changes nothing.
    """
    events, folder = plan.events(tuple(callbacks)), plan.output_dir
    if plan.machine.world_size > 1:
        raise RefusedError(f"parallel: {plan.machine.world_size} processes were started; runs use one for now")
    with claimed(folder) as claim:
        events.run_started(plan=plan)
        for text in (*plan.data.left_out, plan.emulated, plan.tight):
            if text:
                events.note(text=text)
        with phase(events, "hashing the documents") as tell:
            fingerprint = plan.data.documents.fingerprint(tell)
        with phase(events, "hashing the model") as tell:
            who = identity(plan, fingerprint, tell)
        documents = count(plan, fingerprint, folder / TOKENS, events)  # a bad one stops the run before anything moves
        found = settle(claim, who, _length(plan), lambda text: events.note(text=text))
        done = finished(folder)
        if done is not None and done[1] == _length(plan) and (found is None or found[1].step == done[0]):
            if locked_by(folder) != who:
                write_lock(folder, lock_of(plan, who, fingerprint))
            _say_finished(events, done[0], folder)
        else:
            write_lock(folder, lock_of(plan, who, fingerprint))
            corpus = prepare(plan, fingerprint, documents, folder / TOKENS, events)
            _Job(plan, corpus, who, events).run(found)
    events.run_finished(output_dir=folder)
    return folder


def _length(plan: Plan) -> dict[str, Any]:
    """How long the recipe asks to train."""
    keys = ["num_train_epochs", "max_steps"]
    if plan.recipe.train.early_stopping_patience is not None:
        keys += ["early_stopping_patience", "early_stopping_min_delta"]
    return {key: getattr(plan.recipe.train, key) for key in keys}


def _say_finished(events: Callbacks, steps: int, folder: Path) -> None:
    events.note(
        text=f"this run is finished ({steps} steps) and nothing is done again; `nanovllm generate {folder} --prompt ...` "
        "answers other prompts, a higher train.num_train_epochs or train.max_steps goes on"
    )


class _Job:
    """The part of a run that has a model."""

    def __init__(self, plan: Plan, corpus: Corpus, identity: str, events: Callbacks) -> None:
        self.plan, self.corpus, self.identity, self.events = plan, corpus, identity, events
        self.folder = plan.output_dir
        self.config = models_of(plan.model).config(shape=plan.model.shape)
        g = plan.recipe.generate
        params = SamplingParams(
            temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, max_tokens=g.max_tokens, stop=g.stop, seed=g.seed
        )
        self.params = [params] * len(g.prompts)
        answerable(
            g.prompts, self.params, corpus.tokenizer, plan.model.shape.max_positions
        )  # or say so before training

    def run(self, found: tuple[Path, checkpoint.State] | None) -> None:
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
            _say_finished(self.events, state.step, self.folder)
            return
        if state is not None:
            self.events.note(text=f"going on from checkpoint-{state.step}")
            if state.step >= settings.total_steps and state.step < state.total_steps:
                self.events.note(
                    text=f"the recipe asks for {settings.total_steps} steps and {state.step} are done: the model is exported as "
                    "it is"
                )
                trainer.evaluate()  # the saved figures are older than the weights
            elif state.total_steps != settings.total_steps:
                self.events.note(
                    text=f"the learning rate's schedule is laid out anew over {settings.total_steps} steps "
                    f"(it was {state.total_steps})"
                )
        trainer.run(self.save)
        if trainer.before:
            self.events.note(
                text=f"held-out perplexity: {trainer.before['eval_perplexity']:,.2f} before, "
                f"{trainer.metrics['eval_perplexity']:,.2f} after"
            )
        model = trainer.model
        files = export(self.folder, model.full_state(), self.config, self.corpus.tokenizer, self.plan.model.shape.dtype)
        self.generate(model)
        mark_finished(self.folder, trainer.step, _length(self.plan), files)

    def trainer(self, found: tuple[Path, checkpoint.State] | None) -> tuple[Trainer, Settings]:
        plan, train = self.plan, self.plan.recipe.train
        saved = ModelFolder.open(found[0]) if found else None
        model = assemble(
            plan.model, plan.machine.device, seed=train.seed, training=True, weight=saved.tensor if saved else None
        )
        rows = sequences_per_step(plan)
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
        trainer = Trainer(model, data, settings, self.events, self.corpus.evaluation)
        checkpoint.seed_random_state(train.seed)  # dropout draws from it, where a model has any
        if found:
            path, state = found
            checkpoint.load_optimizer(path, trainer.optimizer, model.module.named_parameters(), trainer.trained_from)
            checkpoint.set_random_state(state.random[0])
            trainer.step, trainer.position = state.step, state.position
            trainer.metrics, trainer.before = state.metrics, state.before
            trainer.resume(state.progress, longer=total > state.total_steps)
        return trainer, settings

    def save(self, trainer: Trainer) -> None:
        state = checkpoint.State(
            step=trainer.step,
            position=trainer.position,
            total_steps=trainer.settings.total_steps,
            identity=self.identity,
            tokenizer=self.corpus.tokenizer.fingerprint,
            metrics=trainer.metrics,
            before=trainer.before,
            progress=trainer.progress(),
            random=[checkpoint.random_state()],
        )
        path = checkpoint.save(
            self.folder,
            state,
            trainer.model.full_state(),
            trainer.optimizer,
            trainer.model.module.named_parameters(),
            lambda partial: write_config(partial, self.config, self.corpus.tokenizer, "float32"),
        )
        self.events.checkpoint_saved(step=trainer.step, path=path)

    def generate(self, model: Parallelized) -> None:
        prompts, shape = self.plan.recipe.generate.prompts, self.plan.model.shape
        outputs = generate(
            model.module,
            self.corpus.tokenizer,
            prompts,
            self.params,
            shape=shape,
            device=self.plan.machine.device,
            max_len=shape.max_positions,
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            self.events.generated(prompt=prompt, text=output["text"])
