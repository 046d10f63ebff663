"""A module as it is: nothing is wrapped, nothing is communicated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from nanovllm_core.contracts import Module


class Local:
    """`Parallelized` for one rank."""

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
        norm = torch.nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_((p for _, p in self.module.named_parameters()), max_norm, norm)
        return norm

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()
