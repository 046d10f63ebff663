"""The model's part of a plan: tokenizer, vocabulary, model, shape, layout, kernels.

What is settled before the machine is looked at (`outlined`) needs no torch; the rest (`placed`) does.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import evolve, frozen

from nanovllm_core.budget import frozen_parameters, memory_of
from nanovllm_core.contracts import (
    GENERATION,
    JOINED,
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
from nanovllm_core.hooks import bound
from nanovllm_core.hookspecs import Kernels, Models, Parallel, Tokenizers
from nanovllm_core.machine import Machine
from nanovllm_core.negotiate import Candidate, Choice, ask, choose
from nanovllm_core.recipe import AUTO, Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import OURS, Slots
from nanovllm_core.structure import line


@frozen(kw_only=True, eq=False)
class ModelPlan:
    """Everything needed to build a model and its tokenizer."""

    tokenizer: Choice
    vocabulary: Decision
    model: Choice
    shape: Shape
    dtype: str  # compute dtype
    weights: str  # dtype of weights, gradients and moments in training
    frozen: int  # parameters that are never trained
    parallel: Choice
    layout: Layout
    kernels: Mapping[str, Choice]  # by operation

    @property
    def joined(self) -> tuple[str, ...]:
        """The operations that a kernel does in one."""
        return tuple(name for name in self.kernels if name in JOINED)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.tokenizer, self.model, self.parallel, *self.kernels.values())


def plan_model(
    recipe: Recipe, registry: Registry, machine: Machine, *, data_bytes: int = 0, training: bool = True
) -> ModelPlan:
    """The model's part of a plan, also made for a folder that only generates."""
    slots = Slots(registry, recipe)
    parts = Parts.of(slots)
    return placed(slots, parts, outlined(slots, parts, data_bytes), machine, training=training)


Asked = tuple[list[Candidate], str]  # who is asked for a slot, and by what


@frozen
class Parts:
    """The components that can fill the slots of a model, found and with their options checked."""

    models: Asked
    tokenizer: Candidate | None  # None: the model's own
    parallel: Asked
    kernels: Mapping[str, Asked]  # by operation, as in the recipe

    @classmethod
    def of(cls, slots: Slots) -> Parts:
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
class Outline:
    """What is settled before the machine is looked at."""

    tokenizer: Choice
    vocabulary: Decision
    model: Choice
    shape: Shape


def outlined(slots: Slots, parts: Parts, data_bytes: int) -> Outline:
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
        if not set(JOINED.get(operation, (GENERATION.get(operation, operation),))) <= {*shape.operations, "*", ""}:
            raise RefusedError(
                line(
                    f"{component.use} is named for an operation that model {model.entry.name} does not call (it calls: "
                    f"{', '.join(shape.operations)}); leave the key out",
                    ("kernels", operation),
                    recipe.text,
                    key=True,
                )
            )
    return Outline(tokenizer, vocabulary, model, shape)


def _answered(choice: Choice, hook: str, answer: object, expected: type) -> None:
    if not isinstance(answer, expected):
        raise BrokenComponent(f"{choice.entry.label}: {hook!r} answered {answer!r:.60}, not a {expected.__name__}")


def placed(slots: Slots, parts: Parts, outline: Outline, machine: Machine, *, training: bool) -> ModelPlan:
    recipe, shape = slots.recipe, outline.shape
    dtype = _compute_dtype(recipe, machine)
    weights = _weight_dtype(recipe, dtype) if training else dtype
    frozen = frozen_parameters(recipe, bound(Models, outline.model.component), shape, dtype) if training else 0
    request = ParallelRequest(
        world_size=machine.world_size,
        device=machine.device,
        shape=shape,
        memory_needed=memory_of(recipe, machine, shape, dtype, frozen).total,
        memory_available=machine.memory,
        deterministic=recipe.train.deterministic and training,
    )
    asked, by = parts.parallel
    place = slots.place(recipe.parallel.at)
    probe = lambda p: _within_limits(bound(Parallel, p).probe(request=request), shape, request)  # noqa: E731
    parallel = choose("parallel", asked, probe, by, place)
    layout = parallel.accept.layout or Layout()
    wanted = KernelRequest(
        operation="", device=machine.device, dtype=dtype, shape=shape, training=training, tensor=layout.tensor
    )
    kernels = {name: _kernel(slots, parts, evolve(wanted, operation=name)) for name in shape.operations}
    for name, its in JOINED.items():
        if set(its) <= set(kernels) and (joined := _joined(slots, parts, evolve(wanted, operation=name), kernels)):
            kernels[name] = joined
    pages = not shape.own_cache and "cache" not in shape.limits
    for name, its_part in GENERATION.items():
        if not its_part or (pages and its_part in kernels):
            kernels[name] = _kernel(slots, parts, evolve(wanted, operation=name, training=False))
    return ModelPlan(
        tokenizer=outline.tokenizer,
        vocabulary=outline.vocabulary,
        model=outline.model,
        shape=shape,
        dtype=dtype,
        weights=weights,
        frozen=frozen,
        parallel=parallel,
        layout=layout,
        kernels=kernels,
    )


def _within_limits(verdict: Verdict, shape: Shape, request: ParallelRequest) -> Verdict:
    """A strategy need not know which models cannot be split, nor of `deterministic`."""
    if request.deterministic and isinstance(verdict, Accept) and not (verdict.layout and verdict.layout.ordered):
        return Refuse("it does not say that it sums gradients in one order, which train.deterministic asks for")
    split = isinstance(verdict, Accept) and verdict.layout is not None and verdict.layout.tensor > 1
    if split and "tensor" in shape.limits:
        return Refuse(f"the model cannot be split over tensor-parallel ranks: {shape.limits['tensor']}")
    return verdict


def _kernel(slots: Slots, parts: Parts, request: KernelRequest) -> Choice:
    key = request.operation if request.operation in parts.kernels else "*"
    (asked, by), place = parts.kernels[key], slots.place(slots.recipe.kernels[key].at)
    probe = lambda k: bound(Kernels, k).probe(request=request)  # noqa: E731
    return choose(f"kernels.{request.operation}", asked, probe, by, place)


def _joined(slots: Slots, parts: Parts, request: KernelRequest, kernels: Mapping[str, Choice]) -> Choice | None:
    """What does a joined operation in one; None where its parts are called one by one.

    It is in one where the recipe names it, or a component offers it and none of its parts was chosen with a higher priority.
    """
    name, named = request.operation, slots.recipe.kernels
    if name in named and named[name].use != AUTO.use:
        if request.tensor > 1:
            problem = "it takes whole matrices, and this layout slices them; leave the key out"
            raise RefusedError(line(problem, named[name].at, slots.recipe.text))
        return _kernel(slots, parts, request)
    if request.tensor > 1 or any(part in named and named[part].use != AUTO.use for part in JOINED[name]):
        return None
    least = max(kernels[part].accept.priority for part in JOINED[name])
    asked, _ = parts.kernels[name if name in parts.kernels else "*"]
    verdicts = [ask(c, lambda k: bound(Kernels, k).probe(request=request)) for c in asked]
    if not any(isinstance(v, Accept) and v.priority >= least for v in verdicts):
        return None
    return _kernel(slots, parts, request)


def _compute_dtype(recipe: Recipe, machine: Machine) -> str:
    wanted = recipe.train.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if machine.device == "cuda" else "fp32"
    return {"bf16": "bfloat16", "fp32": "float32"}[wanted]


def _weight_dtype(recipe: Recipe, dtype: str) -> str:
    """Raises RecipeError where there is no compute type that weights could share."""
    if recipe.train.master_weights:
        return "float32"
    if dtype != "bfloat16":
        raise RecipeError(
            f"{recipe.text.place(('train', 'master_weights'))}: train.master_weights: false trains weights in bf16, and here is "
            f"computed in {dtype}; set train.mixed_precision: bf16, or leave the key out"
        )
    return dtype
