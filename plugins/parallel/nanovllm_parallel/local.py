"""A module as it is: nothing is wrapped, nothing is communicated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nanovllm_core.contracts import Batch, Module
from nanovllm_core.training.sharding import whole


class Local:
    """`Parallelized` for one rank, and what the others add to."""

    data_rank = 0
    data_size = 1

    def __init__(self, module: Module) -> None:
        self.module = module

    def ready(self) -> None:
        pass

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        return self.module(tokens, batch, targets=targets)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def total(self, value: Tensor) -> Tensor:
        return value

    def clip(self, max_norm: float) -> Tensor:
        gradients = [p.grad for _, p in self.module.named_parameters() if p.grad is not None]
        norm = whole(total_norm(gradients))
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_((p for _, p in self.module.named_parameters()), max_norm, norm)
        return norm


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Their norm as of one vector; of bf16 ones in fp32 too."""
    if any(g.dtype == torch.bfloat16 for g in gradients):
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    return torch.nn.utils.get_total_norm(gradients)
