"""What a recipe's training needs of a machine's memory."""

from __future__ import annotations

from collections.abc import Collection

from nanovllm_core.contracts import Layout, Ops, Shape
from nanovllm_core.errors import RecipeError
from nanovllm_core.estimate import Memory, training_memory
from nanovllm_core.hookspecs import Models
from nanovllm_core.machine import Machine
from nanovllm_core.recipe import Recipe
from nanovllm_core.training.freezing import NEVER


def memory_of(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    dtype: str,
    frozen: int,
    layout: Layout | None = None,
    joined: Collection[str] = (),
) -> Memory:
    """The estimate for one device under a layout (default: nothing is split); `frozen` parameters are never trained.

    joined: operations that the chosen kernels do in one.
    """
    train, layout = recipe.train, layout or Layout()
    replicas = layout.data * layout.shard
    micro_batch = train.per_device_train_batch_size * replicas
    step = train.global_batch_size or micro_batch * train.gradient_accumulation_steps
    return training_memory(
        shape,
        tokens=recipe.data.max_seq_length * train.per_device_train_batch_size,
        dtype=dtype,
        device=machine.device,
        gradient_checkpointing=train.gradient_checkpointing,
        accumulates=step > micro_batch,
        frozen=frozen,
        layout=layout,
        joined=joined,
        masters=train.master_weights,
    )


def frozen_parameters(recipe: Recipe, models: Models, shape: Shape, dtype: str) -> int:
    """How many parameters are never trained. Raises RecipeError for a pattern that matches none.

    Asking makes the model's outline, so that is done only where a recipe freezes any.
    """
    freezing = recipe.train.freezing
    if not freezing:
        return 0
    module = models.build(shape=shape, ops=Ops(dtype=dtype))
    try:
        first = freezing.trained_from(module, total=NEVER)
    except RecipeError as e:
        said = next((k for k in ("freeze", "unfreeze", "unfreeze_blocks_every") if str(e).startswith(f"train.{k}")), "")
        raise RecipeError(f"{recipe.text.place(('train', said))}: {e}") from None
    return sum(p.numel() for name, p in module.named_parameters() if first[name] >= NEVER)
