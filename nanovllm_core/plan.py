"""Recipe + registry + machine -> Plan: every choice made, with its reason, before anything is read or built.

Order: vocabulary size (from file sizes) -> shape -> memory -> parallel layout -> kernels (they need the tensor degree).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from nanovllm_core.budget import frozen_parameters, memory_of
from nanovllm_core.contracts import (
    Accept,
    Decision,
    KernelRequest,
    Layout,
    ParallelRequest,
    Refuse,
    Shape,
    Verdict,
)
from nanovllm_core.errors import BrokenComponent, RecipeError, RefusedError
from nanovllm_core.estimate import Memory
from nanovllm_core.files import located
from nanovllm_core.hooks import bind, bound, given
from nanovllm_core.hookspecs import Callbacks, Kernels, Models, Parallel, Tokenizers
from nanovllm_core.machine import Machine
from nanovllm_core.negotiate import Candidate, Choice, choose
from nanovllm_core.options import model_refs
from nanovllm_core.plan_data import DataPlan, plan_data
from nanovllm_core.recipe import AUTO, Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import OURS, Slots
from nanovllm_core.structure import line

PREVIOUS = "previous"  # under output_dir: the contents of earlier, other runs


@frozen(kw_only=True, eq=False)
class ModelPlan:
    """Everything needed to build a model and its tokenizer."""

    tokenizer: Choice
    vocabulary: Decision
    model: Choice
    shape: Shape
    dtype: str  # compute dtype
    frozen: int  # parameters that are never trained
    parallel: Choice
    layout: Layout
    kernels: Mapping[str, Choice]  # by operation

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.tokenizer, self.model, self.parallel, *self.kernels.values())


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


def make_plan(recipe: Recipe, registry: Registry, machine: Machine | None = None) -> Plan:
    """Decide everything. Raises RecipeError, OptionError, ComponentError, DataError or ModelError.

    Without a `machine` this one is looked at, which imports torch (seconds), after all that can be wrong without it.
    """
    slots, text = Slots(registry, recipe), recipe.text
    if recipe.data.path is None:
        raise RecipeError(f"{text.place(('data',))}: data.path is missing: the file or folder of your documents")
    parts = _Parts.of(slots)
    callbacks = tuple(slots.named("callbacks", c) for c in recipe.callbacks)
    output_dir = _output_dir(recipe)
    data = plan_data(slots, output_dir)
    outline = _outline(slots, parts, data.documents.bytes)
    for choice in (outline.model, outline.tokenizer):
        _refuse_own_output(choice, output_dir, recipe)
    length = recipe.data.max_seq_length
    if length > outline.shape.max_positions:
        raise RecipeError(
            f"{text.place(('data', 'max_seq_length'))}: data.max_seq_length: got {length}, at most "
            f"{outline.shape.max_positions} (what {outline.model.entry.name} was made for)"
        )
    machine = machine or Machine.detect()
    model = _placed(slots, parts, outline, machine, training=True)
    return Plan(
        recipe=recipe,
        machine=machine,
        data=data,
        model=model,
        callbacks=callbacks,
        memory=memory_of(recipe, machine, model.shape, model.dtype, model.frozen, model.layout),
        output_dir=output_dir,
        chunk_overlap=_overlap(recipe),
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


def _overlap(recipe: Recipe) -> Decision:
    given, length = recipe.data.chunk_overlap, recipe.data.max_seq_length
    if given is not None:
        return Decision(given, "the recipe says so")
    if length // 4 < 128:
        return Decision(length // 4, f"a quarter of max_seq_length {length}")
    return Decision(128, "default")


def plan_model(
    recipe: Recipe, registry: Registry, machine: Machine, *, data_bytes: int = 0, training: bool = True
) -> ModelPlan:
    """The model's part of a plan, also made for a folder that only generates."""
    slots = Slots(registry, recipe)
    parts = _Parts.of(slots)
    return _placed(slots, parts, _outline(slots, parts, data_bytes), machine, training=training)


Asked = tuple[list[Candidate], str]  # who is asked for a slot, and by what


@frozen
class _Parts:
    """The components that can fill the slots of a model, found and with their options checked."""

    models: Asked
    tokenizer: Candidate | None  # None: the model's own
    parallel: Asked
    kernels: Mapping[str, Asked]  # by operation, as in the recipe

    @classmethod
    def of(cls, slots: Slots) -> _Parts:
        recipe = slots.recipe
        if recipe.model is None:
            raise RecipeError(
                f"{recipe.text.place(())}: model is missing: e.g. `model: {{use: preset, size: tiny}}` for a new model, or "
                "`model: {use: pretrained, path: FOLDER_OR_HUB_NAME}` to fine-tune one"
            )
        wanted = recipe.tokenizer
        return cls(
            models=slots.candidates("models", [recipe.model]),
            tokenizer=slots.named("tokenizers", wanted) if wanted and wanted.use != AUTO.use else None,
            parallel=slots.candidates("parallel", [recipe.parallel]),
            kernels={operation: slots.candidates("kernels", [c]) for operation, c in recipe.kernels.items()},
        )


@frozen
class _Outline:
    """What is settled before the machine is looked at."""

    tokenizer: Choice
    vocabulary: Decision
    model: Choice
    shape: Shape


def _outline(slots: Slots, parts: _Parts, data_bytes: int) -> _Outline:
    recipe = slots.recipe
    assert recipe.model is not None
    at, wanted = recipe.model.at, recipe.tokenizer
    model = choose("model", parts.models[0], lambda m: bound(Models, m).probe(), parts.models[1], slots.place(at))
    models, own, by = bound(Models, model.component), parts.tokenizer, "recipe"
    if own is None:  # the model's; options of `auto` go over its options
        by = "default"
        with slots.placed(at):
            options = {**models.tokenizer(), **(wanted.options if wanted else {})}
        component = Component(use=options.pop("use"), options=options, at=("tokenizer",))
        own = slots.named("tokenizers", component, home=(model.entry.distribution, OURS))
    told = f"{model.entry.name} goes with it" if by == "default" else "named in the recipe"
    tokenizer = choose("tokenizer", [own], lambda t: Accept(why=told), by)
    with slots.placed(wanted.at if wanted else at):
        vocabulary = bound(Tokenizers, tokenizer.component).vocab_size(data_bytes=data_bytes)
        _answered(tokenizer, "vocab_size", vocabulary, Decision)
    with slots.placed(at):
        shape = models.shape(vocab_size=vocabulary.value)
        _answered(model, "shape", shape, Shape)
    for operation, component in recipe.kernels.items():
        if operation not in (*shape.operations, "*"):
            raise RefusedError(
                line(
                    f"{component.use} is named for an operation that model {model.entry.name} does not call (it calls: "
                    f"{', '.join(shape.operations)}); leave the key out",
                    ("kernels", operation),
                    recipe.text,
                    key=True,
                )
            )
    return _Outline(tokenizer, vocabulary, model, shape)


def _answered(choice: Choice, hook: str, answer: object, expected: type) -> None:
    if not isinstance(answer, expected):
        raise BrokenComponent(f"{choice.entry.label}: {hook!r} answered {answer!r:.60}, not a {expected.__name__}")


def _placed(slots: Slots, parts: _Parts, outline: _Outline, machine: Machine, *, training: bool) -> ModelPlan:
    recipe, shape = slots.recipe, outline.shape
    dtype = _compute_dtype(recipe, machine)
    frozen = frozen_parameters(recipe, bound(Models, outline.model.component), shape, dtype) if training else 0
    request = ParallelRequest(
        world_size=machine.world_size,
        device=machine.device,
        shape=shape,
        memory_needed=memory_of(recipe, machine, shape, dtype, frozen).total,
        memory_available=machine.memory,
    )
    asked, by = parts.parallel
    place = slots.place(recipe.parallel.at)
    probe = lambda p: _within_limits(bound(Parallel, p).probe(request=request), shape)  # noqa: E731
    parallel = choose("parallel", asked, probe, by, place)
    layout = parallel.accept.layout or Layout()
    kernels = {
        operation: _kernel(slots, parts, KernelRequest(
            operation=operation, device=machine.device, dtype=dtype, shape=shape, training=training, tensor=layout.tensor
        ))
        for operation in shape.operations
    }  # fmt: skip
    return ModelPlan(
        tokenizer=outline.tokenizer,
        vocabulary=outline.vocabulary,
        model=outline.model,
        shape=shape,
        dtype=dtype,
        frozen=frozen,
        parallel=parallel,
        layout=layout,
        kernels=kernels,
    )


def _within_limits(verdict: Verdict, shape: Shape) -> Verdict:
    """A strategy need not know which models cannot be split."""
    split = isinstance(verdict, Accept) and verdict.layout is not None and verdict.layout.tensor > 1
    if split and "tensor" in shape.limits:
        return Refuse(f"the model cannot be split over tensor-parallel ranks: {shape.limits['tensor']}")
    return verdict


def _kernel(slots: Slots, parts: _Parts, request: KernelRequest) -> Choice:
    key = request.operation if request.operation in parts.kernels else "*"
    (asked, by), place = parts.kernels[key], slots.place(slots.recipe.kernels[key].at)
    probe = lambda k: bound(Kernels, k).probe(request=request)  # noqa: E731
    return choose(f"kernels.{request.operation}", asked, probe, by, place)


def _compute_dtype(recipe: Recipe, machine: Machine) -> str:
    wanted = recipe.train.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if machine.device == "cuda" else "fp32"
    return {"bf16": "bfloat16", "fp32": "float32"}[wanted]
