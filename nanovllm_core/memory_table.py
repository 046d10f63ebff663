"""`nanovllm estimate`: what training will hold, part by part and moment by moment, and what would need less."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from attrs import asdict, evolve

from nanovllm_core.budget import memory_of
from nanovllm_core.plan import Plan


def estimate(plan: Plan) -> str:
    """The estimate for a person to read."""
    recipe, shape = plan.recipe, plan.model.shape
    other = not recipe.train.gradient_checkpointing
    without = evolve(recipe, train=evolve(recipe.train, gradient_checkpointing=other))
    memory = memory_of(without, plan.machine, shape, plan.model.dtype, plan.model.frozen, plan.model.layout)
    lines = [
        f"{shape.family}, {shape.parameters:,} parameters ({plan.model.frozen:,} frozen), {plan.model.dtype} on "
        f"{plan.machine.device} ({size_text(plan.machine.memory)} free); a micro-batch of "
        f"{recipe.train.per_device_train_batch_size} x {recipe.data.max_seq_length} tokens",
        *memory_lines(plan),
        f"with train.gradient_checkpointing: {str(other).lower()} the total is {size_text(memory.total)}",
    ]
    return "\n".join(lines) + "\n"


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
