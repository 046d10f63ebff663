"""Recipe + registry + machine -> Plan: every choice made, with its reason, before anything is read or built.

Order: vocabulary size (from file sizes) -> shape -> memory -> parallel layout -> kernels (they need the tensor degree).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import frozen

from nanovllm_core.contracts import (
    Accept,
    Decision,
    KernelRequest,
    Layout,
    ParallelRequest,
    Refuse,
    Shape,
    Source,
    Verdict,
)
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.errors import DataError, RecipeError
from nanovllm_core.estimate import Memory, training_memory
from nanovllm_core.hooks import bind, given
from nanovllm_core.hookspecs import Callbacks, Extractors, Kernels, Models, Parallel, Readers, Tokenizers
from nanovllm_core.machine import Machine
from nanovllm_core.negotiate import Candidate, Choice, Fault, ask, choose, usable
from nanovllm_core.options import model_refs
from nanovllm_core.recipe import AUTO, Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import Slots

Spec = TypeVar("Spec")
PREVIOUS = "previous"  # under output_dir: the contents of earlier, other runs


@frozen(kw_only=True, eq=False)
class ModelPlan:
    """Everything needed to build a model and its tokenizer."""

    tokenizer: Choice
    vocabulary: Decision
    model: Choice
    shape: Shape
    dtype: str  # compute dtype
    parallel: Choice
    layout: Layout
    kernels: Mapping[str, Choice]  # by operation

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (self.tokenizer, self.model, self.parallel, *self.kernels.values())


@frozen(kw_only=True, eq=False)
class DataPlan:
    """Where documents come from and how they are read."""

    documents: Documents
    readers: tuple[Candidate, ...]
    extractors: tuple[Candidate, ...]
    taken: Mapping[str, int]  # reader's full name -> sources that it reads
    assignment: str  # sha256 over which reader takes which source
    faults: tuple[tuple[str, str], ...] = ()  # readers that are broken, and how

    @property
    def left_out(self) -> tuple[str, ...]:
        """What lies among the sources and is not read, in sentences."""
        unknown = sorted(self.documents.unknown.items())
        texts = [f"{n} files of kind {s or '(no suffix)'} are left out: no reader takes them" for s, n in unknown]
        if odd := self.documents.all.odd:
            texts.append(f"{len(odd)} entries are left out, neither file nor folder: {', '.join(odd[:3])}")
        if outputs := self.documents.all.outputs:
            texts.append(f"{len(outputs)} output folders of other runs are left out: {', '.join(outputs[:3])}")
        return (*texts, *(f"reader {name}: {why}; what it should read may be left out" for name, why in self.faults))


class _Pick:
    """Chooses each source's reader, and remembers."""

    def __init__(self, readers: Sequence[Candidate], place: str) -> None:
        self.place = place  # of data.path, for messages
        self.readers, self.taken, self.assignment = readers, Counter[str](), hashlib.sha256()
        self.faults = {c.entry.name: c.unusable for c in readers if c.unusable and not c.misfit}
        self._relays = {id(c.component): _bound(Readers, c.component) for c in usable("data.readers", readers)}

    def __call__(self, source: Source) -> Readers | None:
        """The reader for a source; None when every one refuses. Raises AmbiguousComponent when two tie."""
        verdicts = [(c, ask(c, lambda r: self._relays[id(r)].probe(source=source))) for c in self.readers]
        self.faults |= {c.entry.name: v.why for c, v in verdicts if isinstance(v, Fault)}
        if not any(isinstance(v, Accept) for _, v in verdicts):
            if not source.exists:
                reasons = "".join(f"\n  {c.entry.name}: {v.why}" for c, v in verdicts)
                raise DataError(
                    f"{self.place}: data.path: {source.path!r} is neither a file nor a folder, and no reader takes it:{reasons}"
                )
            return None
        known = {id(c.component): v for c, v in verdicts}
        chosen = choose(f"data.readers ({source.name})", self.readers, lambda r: known[id(r)], "auto")
        self.taken[chosen.entry.full_name] += 1
        self.assignment.update(f"{chosen.entry.full_name}\0{source.name}\n".encode("utf-8", "backslashreplace"))
        return self._relays[id(chosen.component)]


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


def _bound(spec: type[Spec], component: Any) -> Spec:
    return bind(spec, [(type(component).__name__, component)])


def make_plan(recipe: Recipe, registry: Registry, machine: Machine) -> Plan:
    """Decide everything. Raises RecipeError, OptionError, ComponentError, DataError or ModelError."""
    slots = Slots(registry, recipe)
    if recipe.data.path is None:
        raise RecipeError(f"{recipe.text.place(('data',))}: data.path is missing: the file or folder of your documents")
    output_dir = _within(recipe.base, recipe.output_dir)
    data = plan_data(slots, output_dir)
    model = plan_model(recipe, registry, machine, data_bytes=data.documents.bytes)
    for choice in (model.model, model.tokenizer):
        _refuse_own_output(choice, output_dir, recipe)
    train, length = recipe.train, recipe.data.max_seq_length
    if length > model.shape.max_positions:
        raise RecipeError(
            f"{recipe.text.place(('data', 'max_seq_length'))}: data.max_seq_length: got {length}, at most "
            f"{model.shape.max_positions} (what {model.model.entry.name} was made for)"
        )
    return Plan(
        recipe=recipe,
        machine=machine,
        data=data,
        model=model,
        callbacks=tuple(slots.named("callbacks", c) for c in recipe.callbacks),
        memory=training_memory(model.shape, tokens=length * train.per_device_train_batch_size, dtype=model.dtype),
        output_dir=output_dir,
        chunk_overlap=_overlap(recipe),
    )


def _within(base: Path, given: str) -> Path:
    return (base / Path(given).expanduser()).resolve()


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


def plan_data(slots: Slots, output_dir: Path) -> DataPlan:
    recipe = slots.recipe
    assert recipe.data.path is not None
    path, place = recipe.base / Path(recipe.data.path).expanduser(), recipe.text.place(("data", "path"))
    if path.exists() and path.resolve().is_relative_to(output_dir):
        raise RecipeError(
            f"{place}: data.path: {path.resolve()} lies in output_dir {output_dir}, where a run writes and moves what it "
            "finds; name another output_dir"
        )
    sources = Sources.find(str(path.resolve()) if path.exists() else recipe.data.path, exclude=output_dir)
    readers = tuple(slots.candidates("readers", recipe.data.readers)[0])
    extractors = tuple(slots.candidates("extractors", recipe.data.extractors)[0])
    asked = usable("data.extractors", extractors)  # in this order; the first answer wins
    relay = bind(Extractors, [(c.entry.full_name, c.component) for c in asked])
    pick = _Pick(readers, str(place))
    documents = Documents(sources, pick, lambda record: relay.extract(record=record), recipe.data.allowed_errors)
    return DataPlan(
        documents=documents,
        readers=readers,
        extractors=extractors,
        taken=pick.taken,
        assignment=pick.assignment.hexdigest(),
        faults=tuple(sorted(pick.faults.items())),
    )


def plan_model(
    recipe: Recipe, registry: Registry, machine: Machine, *, data_bytes: int = 0, training: bool = True
) -> ModelPlan:
    """The model's part of a plan, also made for a folder that only generates."""
    slots = Slots(registry, recipe)
    if recipe.model is None:
        raise RecipeError(
            f"{recipe.text.place(())}: model is missing: e.g. `model: {{use: preset, size: tiny}}` for a new model, or "
            "`model: {use: pretrained, path: FOLDER_OR_HUB_NAME}` to fine-tune one"
        )
    candidates, by = slots.candidates("models", [recipe.model])
    model = choose("model", candidates, lambda m: _bound(Models, m).probe(), by)
    models = _bound(Models, model.component)
    wanted, by = recipe.tokenizer, "recipe"
    if wanted is None or wanted.use == AUTO.use:  # the model's own; options of `auto` go over its options
        own = {**models.tokenizer(), **(wanted.options if wanted else {})}
        wanted, by = Component(use=own.pop("use"), options=own, at=("tokenizer",)), "default"
    told = f"{model.entry.name} goes with it" if by == "default" else "named in the recipe"
    tokenizer = choose("tokenizer", [slots.named("tokenizers", wanted)], lambda t: Accept(why=told), by)
    vocabulary = _bound(Tokenizers, tokenizer.component).vocab_size(data_bytes=data_bytes)
    shape = models.shape(vocab_size=vocabulary.value)
    dtype = _compute_dtype(recipe, machine)
    tokens = recipe.data.max_seq_length * recipe.train.per_device_train_batch_size
    request = ParallelRequest(
        world_size=machine.world_size,
        device=machine.device,
        shape=shape,
        memory_needed=training_memory(shape, tokens=tokens, dtype=dtype).total,
        memory_available=machine.memory,
    )
    strategies, by = slots.candidates("parallel", [recipe.parallel])
    parallel = choose(
        "parallel", strategies, lambda p: _within_limits(_bound(Parallel, p).probe(request=request), shape), by
    )
    layout = parallel.accept.layout or Layout()
    kernels = {
        operation: _kernel(slots, operation, KernelRequest(
            operation=operation, device=machine.device, dtype=dtype, shape=shape, training=training, tensor=layout.tensor
        ))
        for operation in shape.operations
    }  # fmt: skip
    return ModelPlan(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        model=model,
        shape=shape,
        dtype=dtype,
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


def _kernel(slots: Slots, operation: str, request: KernelRequest) -> Choice:
    wanted = slots.recipe.kernels.get(operation, slots.recipe.kernels.get("*", AUTO))
    candidates, by = slots.candidates("kernels", [wanted])
    return choose(f"kernels.{operation}", candidates, lambda k: _bound(Kernels, k).probe(request=request), by)


def _compute_dtype(recipe: Recipe, machine: Machine) -> str:
    wanted = recipe.train.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if machine.device == "cuda" else "fp32"
    return {"bf16": "bfloat16", "fp32": "float32"}[wanted]
