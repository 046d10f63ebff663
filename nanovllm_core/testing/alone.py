"""One rank without a strategy: what every layout is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nanovllm_core.assemble import fill
from nanovllm_core.contracts import Accept, Batch, Layout, Module, ParallelRequest
from nanovllm_core.hookspecs import Parallel
from nanovllm_core.testing.reference import reference_ops
from nanovllm_core.testing.tiny import Tiny


class Held:
    """`Parallelized` for one rank, written out."""

    data_rank = 0
    data_size = 1

    def __init__(self, module: Module) -> None:
        self.module = module

    def micro_batch(self, last: bool) -> nullcontext[None]:
        return nullcontext()

    def total(self, value: Tensor) -> Tensor:
        return value

    def clip(self, max_norm: float) -> Tensor:
        gradients = [p.grad for _, p in self.module.named_parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        if 0 < max_norm < norm:
            for g in gradients:
                g.mul_(max_norm / norm)
        return norm

    def ready(self) -> None:
        pass

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        return self.module(tokens, batch, targets=targets)


class Alone(Parallel):
    """The strategy that does nothing, called without hooks."""

    def probe(self, request: ParallelRequest) -> Accept:
        return Accept(why="one rank", layout=Layout())

    def parallelize(self, module: Module, layout: Layout, mesh: Any) -> Held:
        return Held(module)


def module_of(weights: Mapping[str, Tensor]) -> Module:
    """The model with these weights."""
    with torch.device("meta"):
        module: Any = Tiny(reference_ops())
    fill(module, lambda name: weights[name].clone(), "cpu")
    held: Module = module
    return held
