"""AdamW, with the decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanovllm_core.training.sharding import local

EPS = 1e-8


class Optimizer(Protocol):
    """What checkpoints need of an optimizer; torch's have it."""

    param_groups: list[dict[str, Any]]
    state: Any  # a parameter's tensors by name


def decayed(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay, vectors (norms, biases) do not."""
    parameters = list(named)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> AdamW:
    """The optimizer of a run."""
    return AdamW(decayed(named, weight_decay), learning_rate=learning_rate, betas=betas)


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019) on what this rank holds of each tensor, in torch's fused kernel.

    It is elementwise, so ranks need not know of each other. torch.optim.AdamW does the same, but goes through DTensors, which
    costs a GPU its time, and imports torch's compiler, which costs 1.4 s. A parameter without a gradient is passed over: it neither
    moves nor decays, and has no state.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], *, learning_rate: float, betas: tuple[float, float]
    ) -> None:
        self.param_groups = [{**group, "lr": learning_rate} for group in groups]
        self.betas = betas
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """One step by gradients / `divisor`, or none where `skip` is 1: both fp32 on the device, which nobody waits for."""
        for group in self.param_groups:
            alike: dict[object, list[nn.Parameter]] = {}  # what the kernel takes in one call
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for trained in alike.values():
                self._update(trained, group, divisor, skip)

    def _update(
        self, trained: Sequence[nn.Parameter], group: Mapping[str, Any], divisor: Tensor | None, skip: Tensor | None
    ) -> None:
        states = [self._state(p) for p in trained]
        steps, averages, squares = (
            [local(state[key]) for state in states] for key in ("step", "exp_avg", "exp_avg_sq")
        )
        torch._foreach_add_(steps, 1)
        weights, gradients = [local(p) for p in trained], [local(p.grad) for p in trained if p.grad is not None]
        torch._fused_adamw_(
            weights, gradients, averages, squares, [], steps, lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=group["weight_decay"], eps=EPS, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=skip,
        )  # fmt: skip
        if skip is not None:
            torch._foreach_sub_(steps, [skip] * len(steps))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
