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
    """AdamW (Loshchilov and Hutter, 2019) on what this rank holds of each tensor, in torch's fused kernel; of bf16 weights, whose
    moments are bf16 too, in fp32 with stochastic rounding (`rounded_`).

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
    def update(self, divisor: Tensor | None = None, skip: Tensor | None = None, seed: int = 0) -> None:
        """One step by gradients / `divisor`, or none where `skip` is 1: both fp32 on the device, which nobody waits for.

        seed: of what bf16 weights are rounded by; another one each step. Replicas of a weight stay alike.
        """
        for group in self.param_groups:
            alike: dict[object, list[nn.Parameter]] = {}  # what the kernel takes in one call
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
            for trained in alike.values():
                if trained[0].dtype == torch.bfloat16:
                    self._update_rounded(trained, group, divisor, skip, seed)
                else:
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

    def _update_rounded(
        self, trained: Sequence[nn.Parameter], group: Mapping[str, Any], divisor: Tensor | None, skip: Tensor | None, seed: int
    ) -> None:  # fmt: skip
        """Each tensor by itself, so that there is one in fp32 at a time."""
        random, rate, (beta1, beta2) = torch.Generator(trained[0].device), group["lr"], self.betas
        places = {id(p): i for i, p in enumerate(group["params"])}
        for p in trained:
            random.manual_seed((seed << 20) + places[id(p)])  # whatever part of others a rank holds
            state = self._state(p)
            step, average, square = (local(state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
            goes_on = 1 if skip is None else 1 - skip
            step += goes_on
            weight, gradient = local(p), local(p.grad).float()  # type: ignore[arg-type]
            if divisor is not None:
                gradient /= divisor
            mean = average.float().lerp_(gradient, 1 - beta1)
            variance = square.float().lerp_(gradient.square_(), 1 - beta2)
            size = torch.div(variance, 1 - beta2**step, out=gradient).sqrt_().add_(EPS)
            by = torch.div(mean, size, out=size).mul_(rate / (1 - beta1**step))
            moved = weight.float().mul_(1 - rate * group["weight_decay"]).sub_(by)
            del gradient, size, by
            for kept, new in ((weight, moved), (average, mean), (square, variance)):
                found = rounded_(new, random)
                kept.copy_(found if skip is None else torch.where(skip > 0, kept, found))

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


def rounded_(exact: Tensor, random: torch.Generator) -> Tensor:
    """fp32, which is used up, as bf16: one of its two neighbours, the nearer one the likelier, so that the mean is kept (Gupta et
    al., "Deep learning with limited numerical precision", 2015)."""
    by = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=random)
    by *= exact.isfinite()
    exact.view(torch.int32).add_(by).bitwise_and_(-(1 << 16))
    return exact.to(torch.bfloat16)
