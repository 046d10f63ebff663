"""One module over one mesh, whatever the layout: tensor slices, then shards or replicas.

data x shard x tensor
n x 1 x 1        DistributedDataParallel: every rank holds everything
any x n x any    fully_shard over shard, replicas over data (and with slices, over a shard of one)
any x any x n    each rank of a tensor group holds a slice of the matrices (`slices`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from nanovllm_core.contracts import Layout, Module
from nanovllm_parallel.local import Local, total_norm


class Group(Local):
    """What ranks of a mesh share. Ranks of one tensor group see the same documents and count once. No mesh: one rank."""

    def __init__(self, module: Module, layout: Layout, mesh: Any) -> None:
        super().__init__(module)
        self.groups: list[Any] = []
        if mesh is None:
            return
        data, shard = (mesh.get_local_rank(axis) for axis in ("data", "shard"))
        self.data_rank, self.data_size = data * layout.shard + shard, layout.data * layout.shard
        self.groups = [mesh.get_group(axis) for axis in ("data", "shard") if mesh[axis].size() > 1]

    def clip(self, max_norm: float) -> Tensor:
        """On local parts: going through DTensors costs some 0.1 ms of processor a parameter, and here the GPU waits."""
        from torch.distributed.tensor import DTensor  # a second to import, which one rank does not need

        parts: dict[tuple[int, ...], list[Tensor]] = {}  # axes that a gradient is split over -> this rank's parts
        mesh: Any = None
        for _, p in self.module.named_parameters():
            if (g := p.grad) is None:
                continue
            axes: tuple[int, ...] = ()
            if isinstance(g, DTensor):
                mesh = g.device_mesh
                axes = tuple(i for i, placement in enumerate(g.placements) if hasattr(placement, "dim"))
                g = g.to_local()
            parts.setdefault(axes, []).append(g)
        squares = []
        for axes, gradients in parts.items():
            square = total_norm(gradients).square()
            for axis in axes:
                distributed.all_reduce(square, group=mesh.get_group(axis))
            squares.append(square)
        norm = torch.stack(squares).sum().sqrt()
        if max_norm > 0:
            torch._foreach_mul_([g for some in parts.values() for g in some], (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def total(self, value: Tensor) -> Tensor:
        if self.groups:
            value = value.clone()
            for group in self.groups:
                distributed.all_reduce(value, group=group)
        return value


def spread(module: Module, layout: Layout, mesh: Any) -> Local:
    """The module as `layout` lays it out over `mesh`, whose axes are data, shard and tensor."""
    if layout.ordered:
        from nanovllm_parallel.ordered import Ordered

        return Ordered(module, layout, mesh)
    if mesh is None:
        return Local(module)
    if layout.tensor > 1:
        from nanovllm_parallel.slices import slice_by_roles

        slice_by_roles(module, mesh["tensor"])
    if layout.shard > 1 or (layout.tensor > 1 and layout.data > 1):
        from nanovllm_parallel.sharded import Sharded

        return Sharded(module, layout, mesh)
    if layout.data > 1:
        from nanovllm_parallel.replicated import Replicated

        return Replicated(module, layout, mesh)
    return Group(module, layout, mesh)
