"""`nanovllm estimate`: what training will hold, part by part and moment by moment, and what would need less."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from attrs import asdict, evolve

from nanovllm_core.budget import memory_of
from nanovllm_core.errors import TrainingError
from nanovllm_core.plan import Plan


def estimate(plan: Plan) -> str:
    """The estimate for a person to read."""
    recipe, shape = plan.recipe, plan.model.shape
    others = [v for v in ("selective", True, False) if v != recipe.train.gradient_checkpointing]
    lines = [
        f"{shape.family}, {shape.parameters:,} parameters ({plan.model.frozen:,} frozen), {plan.model.dtype} on "
        f"{plan.machine.device} ({size_text(plan.machine.memory)} free); a micro-batch of "
        f"{recipe.train.per_device_train_batch_size} x {recipe.data.max_seq_length} tokens",
        *memory_lines(plan),
        *(
            f"with train.gradient_checkpointing: {str(v).lower()} the total is {size_text(_total(plan, v))}"
            for v in others
        ),
    ]
    return "\n".join(lines) + "\n"


def _total(plan: Plan, checkpointing: Any) -> int:
    recipe, model = plan.recipe, plan.model
    other = evolve(recipe, train=evolve(recipe.train, gradient_checkpointing=checkpointing))
    return memory_of(other, plan.machine, model.shape, model.dtype, model.frozen, model.layout, model.joined).total


def memory_lines(plan: Plan) -> Iterator[str]:
    """Parts, moments, the total, and what to do when it is too much."""
    memory = plan.memory
    for name in ("weights", "gradients", "optimizer", "activations", "loss"):
        yield f"{name:<18}{size_text(getattr(memory, name)):>10}"
    worst = max(memory.moments, key=memory.moments.__getitem__)
    yield f"{'total':<18}{size_text(memory.total):>10}  at once, at most: {MOMENTS[worst]}"
    if plan.tight:
        yield plan.tight


def estimate_data(plan: Plan) -> dict[str, Any]:
    """The estimate for tools: bytes."""
    return {**asdict(plan.memory), "total": plan.memory.total, "free": plan.machine.memory}


def out_of_memory(plan: Plan, error: BaseException) -> TrainingError | None:
    """What to tell of an error that says that memory ran out, and what needs less; None for any other error."""
    text = str(error)
    of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not of_memory and not any(mark in text for mark in ALLOCATORS):
        return None
    train, data = plan.recipe.train, plan.recipe.data
    rows, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    cures = []
    if rows > 1:
        cures.append(
            f"train.per_device_train_batch_size: {rows // 2} with train.gradient_accumulation_steps: {2 * steps}, which keeps "
            "the step"
        )
    if train.gradient_checkpointing is not True:
        cures.append("train.gradient_checkpointing: true")
    cures.append(f"a lower data.max_seq_length (now {data.max_seq_length})")
    cures.append("parallel: fsdp on more devices" if plan.model.layout.tensor == 1 else "more devices")
    return TrainingError(
        f"out of memory on {plan.machine.device}: the estimate was {size_text(plan.memory.total)}, "
        f"{size_text(plan.machine.memory)} were free when the run began. In this order: {'; '.join(cures)}. "
        f"`nanovllm estimate` says what each would need. ({type(error).__name__}: {' '.join(text.split())[:200]})"
    )


ALLOCATORS = ("can't allocate memory", "CUDA out of memory")  # what torch says of a CPU's and a GPU's memory
MOMENTS = MappingProxyType(
    {
        "loss": "at the loss, before the backward",
        "last block back": "as the backward begins",
        "first block back": "as the backward ends",
        "embedding back": "at the embedding's gradient",
        "update": "at the optimizer's step",
    }
)


def size_text(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
