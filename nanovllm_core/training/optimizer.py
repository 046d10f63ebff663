"""AdamW, with the decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nanovllm_core.training.sharding import local


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> LocalAdamW:
    """AdamW (Loshchilov and Hutter, 2019): matrices decay; vectors (norms, biases) do not. Fused on CPU and GPU.

    A parameter without a gradient is passed over: it neither moves nor decays, and has no state.
    """
    named = list(parameters)
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return LocalAdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=1e-8, fused=True)


class LocalAdamW(torch.optim.AdamW):
    """AdamW on what this rank holds of each tensor: it is elementwise, and going through DTensors costs a GPU its time."""

    # torch's names: what its fused kernel divides gradients by as it reads them, and whether it leaves everything as it is.
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def update(self, divisor: torch.Tensor, skip: torch.Tensor) -> None:
        """One step by gradients / `divisor`, or none where `skip`: both fp32 on the device, which nobody waits for."""
        self.grad_scale, self.found_inf = divisor, skip
        try:
            self.step()
        finally:
            self.grad_scale = self.found_inf = None

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:  # fills the lists for one step
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex
