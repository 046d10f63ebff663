"""Recipe + registry + machine -> Plan: every choice made, with its reason, before anything is read or built.

Order: vocabulary size (from file sizes) -> shape -> memory -> parallel layout -> kernels (they need the tensor degree).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from nanovllm_core.budget import memory_of
from nanovllm_core.contracts import Decision, Layout
from nanovllm_core.errors import RecipeError
from nanovllm_core.estimate import Memory
from nanovllm_core.files import located
from nanovllm_core.hooks import bind, given
from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.machine import Machine
from nanovllm_core.negotiate import Candidate, Choice
from nanovllm_core.options import model_refs
from nanovllm_core.plan_data import DataPlan, plan_data
from nanovllm_core.plan_model import ModelPlan, Parts, outlined, placed
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import Slots

PREVIOUS = "previous"  # under output_dir: the contents of earlier, other runs


@frozen(kw_only=True, eq=False)
class Plan:
    """A recipe with every choice made."""

    recipe: Recipe
    machine: Machine
    data: DataPlan
    model: ModelPlan
    callbacks: tuple[Candidate, ...]
    memory: Memory
    output_dir: Path
    chunk_overlap: Decision
    sequences_per_step: Decision  # over all data ranks

    @property
    def emulated(self) -> str:
        """What to know about a compute type that the device has no instructions for; empty when it has."""
        if self.model.dtype != "bfloat16" or self.machine.bf16:
            return ""
        return "this CPU has no bf16 instructions and emulates them: train.mixed_precision: fp32 is faster here"

    @property
    def tight(self) -> str:
        """What to know when the estimate exceeds what is free; empty when it does not, or that is not known."""
        if not 0 < self.machine.memory < self.memory.total:
            return ""
        return (
            f"training is estimated to need {self.memory.total / 1e9:.1f} GB and {self.machine.memory / 1e9:.1f} GB are free: "
            "lower train.per_device_train_batch_size, data.max_seq_length or the model's size if it runs out of memory"
        )

    def events(self, more: tuple[object, ...] = ()) -> Callbacks:
        """All callbacks as one relay: the recipe's, then those handed to `run`. Raises BrokenComponent."""
        recipes = [(c.entry.full_name, c.component) for c in self.callbacks]
        return bind(Callbacks, [*recipes, *given("callbacks", more)])


def make_plan(recipe: Recipe, registry: Registry, machine: Machine | Callable[[], Machine] | None = None) -> Plan:
    """Decide everything. Raises RecipeError, OptionError, ComponentError, DataError or ModelError.

    Without a `machine` this one is looked at, which imports torch (seconds), after all that can be wrong without it; so is
    one that is given as a function.
    """
    slots, text = Slots(registry, recipe), recipe.text
    if recipe.data.path is None:
        raise RecipeError(f"{text.place(('data',))}: data.path is missing: the file or folder of your documents")
    if recipe.train.early_stopping_patience is not None and not recipe.data.eval_fraction:
        raise RecipeError(
            f"{text.place(('train', 'early_stopping_patience'))}: train.early_stopping_patience: data.eval_fraction is 0, so "
            "nothing is evaluated and there is nothing to stop by; leave it out or hold documents out"
        )
    parts = Parts.of(slots)
    callbacks = tuple(slots.named("callbacks", c) for c in recipe.callbacks)
    output_dir = _output_dir(recipe)
    data = plan_data(slots, output_dir)
    outline = outlined(slots, parts, data.documents.bytes)
    for choice in (outline.model, outline.tokenizer):
        _refuse_own_output(choice, output_dir, recipe)
    length = recipe.data.max_seq_length
    if length > outline.shape.max_positions:
        raise RecipeError(
            f"{text.place(('data', 'max_seq_length'))}: data.max_seq_length: got {length}, at most "
            f"{outline.shape.max_positions} (what {outline.model.entry.name} was made for)"
        )
    machine = machine or Machine.detect
    machine = machine if isinstance(machine, Machine) else machine()
    model = placed(slots, parts, outline, machine, training=True)
    step = _step(recipe, model)
    refuse_unordered(recipe, model.layout, step.value)
    return Plan(
        recipe=recipe,
        machine=machine,
        data=data,
        model=model,
        callbacks=callbacks,
        memory=memory_of(recipe, machine, model.shape, model.dtype, model.frozen, model.layout, model.joined),
        output_dir=output_dir,
        chunk_overlap=overlap_of(recipe.data.chunk_overlap, length),
        sequences_per_step=step,
    )


def _output_dir(recipe: Recipe) -> Path:
    said = f"{recipe.text.place(('output_dir',))}: output_dir: "
    try:
        folder = located(recipe.base, recipe.output_dir).resolve()
    except ValueError as e:
        raise RecipeError(f"{said}{e}") from None
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise RecipeError(f"{said}got {recipe.output_dir!r}, but {there} is a file; name a folder")
    return folder


def _refuse_own_output(choice: Choice, output_dir: Path, recipe: Recipe) -> None:
    """A run moves what it finds in its output folder: it cannot begin from there."""
    for name, value in model_refs(choice.component):
        folder = Path(value).expanduser().resolve()
        if folder.exists() and folder.is_relative_to(output_dir) and not folder.is_relative_to(output_dir / PREVIOUS):
            raise RecipeError(
                f"{recipe.text.place((*choice.at, name))}: {choice.slot}.{name}: {folder} lies in output_dir {output_dir}, "
                "whose contents a new run moves away; name another output_dir"
            )


def refuse_unordered(recipe: Recipe, layout: Layout, step: int) -> None:
    """Raises RecipeError where `train.deterministic` cannot be kept with a step of so many sequences."""
    train = recipe.train
    parts, over = divmod(step, train.per_device_train_batch_size)
    if train.deterministic and (over or parts & (parts - 1) or parts < layout.data):
        raise RecipeError(
            f"{recipe.text.place(('train', 'deterministic'))}: train.deterministic: a step of {step} sequences in "
            f"micro-batches of {train.per_device_train_batch_size} on {layout.data} ranks; it needs 1, 2, 4, 8, ... "
            "micro-batches to a step, at least one a rank: set train.global_batch_size to such a multiple"
        )


def _step(recipe: Recipe, model: ModelPlan) -> Decision:
    train, replicas = recipe.train, model.layout.data * model.layout.shard
    if train.global_batch_size is not None:
        return Decision(train.global_batch_size, "the recipe says so")
    whole = train.per_device_train_batch_size * train.gradient_accumulation_steps * replicas
    told = f"per_device_train_batch_size {train.per_device_train_batch_size} x gradient_accumulation_steps"
    return Decision(whole, f"{told} {train.gradient_accumulation_steps} x {replicas} data ranks")


def overlap_of(given: int | None, length: int) -> Decision:
    """Tokens that a chunk of at most `length` repeats from the one before."""
    if given is not None:
        return Decision(given, "the recipe says so")
    if length // 4 < 128:
        return Decision(length // 4, f"a quarter of max_seq_length {length}")
    return Decision(128, "default")
