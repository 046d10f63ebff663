"""How one model is spread over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from nanovllm_core.contracts.models import Batch, Module, Shape

if TYPE_CHECKING:
    from torch import Tensor


@frozen
class Layout:
    """How ranks are spread: replicas x shards x tensor slices."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    ordered: bool = False  # gradients are summed in one order, whatever the number of ranks
    reshard: bool = True  # a block's shards, gathered for its forward, are put away until its backward


@frozen(kw_only=True)
class ParallelRequest:
    """What a strategy is asked to run."""

    world_size: int
    device: str
    shape: Shape
    memory_needed: int  # bytes on one device, were nothing sharded
    memory_available: int  # bytes on one device; 0 when unknown
    deterministic: bool = False  # an Accept's layout must be `ordered`


class Parallelized(Protocol):
    """A module as a strategy runs it. After the last micro-batch gradients are the sum over data ranks.

    Parameters are plain tensors, the same on every rank, or torch DTensors: so the core can fill them and read them in
    full, each rank its own part, whatever the layout.
    """

    module: Module
    data_rank: int
    data_size: int

    def ready(self) -> None:
        """Every parameter holds its weight now; called once, before the first forward."""
        ...

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        """The summed loss of this rank's micro-batch, an fp32 scalar; without gradients outside `micro_batch`."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; communication may wait for the last."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum over data ranks."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients to at most this global L2 norm (0: never); the norm before scaling."""
        ...
