"""Between what is whole and what a rank holds of it. Parameters are plain tensors, or torch's DTensors on any mesh.

A DTensor that a strategy splits over several mesh axes is split from the last axis to the first: tensor-parallel slices
first, then shards of the slice, which is what torch's `fully_shard` does to a tensor-parallel parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nanovllm_core.contracts import Module, Parallelized


def is_spread(tensor: Tensor) -> bool:
    """Whether a rank holds only its part of it, or knows it as one of several copies (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, spread as `like` is. Communicates nothing; may be a view."""
    if not is_spread(like):
        return whole
    spread: Any = like
    mesh, local = spread.device_mesh, whole
    for axis in reversed(range(mesh.ndim)):
        dim = getattr(spread.placements[axis], "dim", None)  # of Shard, and of what fully_shard makes of a slice
        if dim is not None:
            local = chunk(local, dim, mesh.size(axis), mesh.get_coordinate()[axis])
    return local


def spread_as(like: Tensor, local: Tensor) -> Tensor:
    """A tensor of `like`'s shape and layout, of which this rank holds `local`."""
    if not is_spread(like):
        return local
    from torch.distributed.tensor import DTensor

    spread: Any = like
    made: Tensor = DTensor.from_local(
        local, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    spread: Any = tensor
    mine: Tensor = spread.to_local() if is_spread(tensor) else tensor
    return mine


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full, on every rank. All ranks must call it."""
    spread: Any = tensor
    full: Tensor = spread.full_tensor() if is_spread(tensor) else tensor
    return full


def full_state(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in full, one at a time, by its Hugging Face name. All ranks must iterate to the end."""
    for name, parameter in module.named_parameters():
        yield name, whole(parameter.detach())


def of_all_ranks(model: Parallelized, mine: Tensor) -> Tensor:
    """[turns, ...] of each data rank as [turns, data ranks, ...] on every one: exact, each value is added to zeros."""
    table = mine.new_zeros(len(mine), model.data_size, *mine.shape[1:])
    table[:, model.data_rank] = mine
    return model.total(table)


def chunk(tensor: Tensor, dim: int, count: int, index: int) -> Tensor:
    """One of `count` parts as torch.chunk makes them: the last ones may be shorter, or empty."""
    size = -(-tensor.shape[dim] // count)
    start = min(index * size, tensor.shape[dim])
    return tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
