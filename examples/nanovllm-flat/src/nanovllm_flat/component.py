"""Replicas that add up their gradients in one exchange, after the last micro-batch.

Simpler than DistributedDataParallel and without its overlap: all gradients stand in one flat buffer, which is what is
exchanged. On a slow network with long steps the one message costs less than many that wait for each other's start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nanovllm_core.contracts import Accept, Batch, Layout, Module, Parallelized, ParallelRequest, Verdict
from nanovllm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True, eq=False)
class Flat:
    """The whole model on every rank; gradients are added up once a step, as one buffer."""

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        return Accept(-5, "when it is named", Layout(data=request.world_size))

    @hookimpl
    def parallelize(self, module: Module, layout: Layout, mesh: Any) -> Parallelized:
        return _Flat(module, None if mesh is None else mesh.get_group("data"), layout.data)


class _Flat:
    """`contracts.Parallelized`."""

    def __init__(self, module: Module, group: Any, size: int) -> None:
        from torch import distributed

        self.module, self.group, self.data_size = module, group, size
        self.data_rank = 0 if group is None else distributed.get_rank(group)

    def ready(self) -> None:
        pass

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        return self.module(tokens, batch, targets=targets)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        import torch

        yield
        if last and self.group is not None:
            gradients = self._gradients()
            whole = self.total(torch.cat([g.reshape(-1) for g in gradients]))
            start = 0
            for g in gradients:
                g.copy_(whole[start : start + g.numel()].view_as(g))
                start += g.numel()

    def total(self, value: Tensor) -> Tensor:
        from torch import distributed

        if self.group is not None:
            value = value.clone()
            distributed.all_reduce(value, group=self.group)
        return value

    def clip(self, max_norm: float) -> Tensor:
        import torch

        norm = torch.nn.utils.get_total_norm(self._gradients())
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_((p for _, p in self.module.named_parameters()), max_norm, norm)
        return norm

    def _gradients(self) -> list[Tensor]:
        return [p.grad for _, p in self.module.named_parameters() if p.grad is not None]
