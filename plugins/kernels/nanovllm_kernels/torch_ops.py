"""The small operations: embedding, linear, rms_norm, layer_norm, rotary, swiglu, gelu.

On a CPU a small model's step is bound by passes over memory next to its matmuls, so norm, rotation and SwiGLU have
hand-made backwards: they keep their inputs only, recompute what is cheap and work in place on what they own. That is
a third to a half of autograd's time for the norm and two thirds for SwiGLU. None of the three can be differentiated
twice.

For bf16 inputs norm and rotation calculate in fp32 and round once; SwiGLU rounds silu(gate) and the product. fp64 stays
fp64, which is what the gradient checks use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def embedding(ids_T: Tensor, weight_VC: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows of the table in the compute dtype, [T, C]."""
    if torch.is_grad_enabled():
        return F.embedding(ids_T, weight_VC).to(dtype)
    return weight_VC[ids_T].to(dtype)  # of a few ids on a GPU in 2 us, where that takes 12


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype. Master weights are cast at each call; their gradient comes back in fp32."""
    return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019)."""
    return _RmsNorm.apply(x, weight_C, eps)


def layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last axis (Ba et al., 2016)."""
    high = wide(x.dtype)
    return F.layer_norm(x.to(high), weight_C.shape, weight_C.to(high), bias_C.to(high), eps).to(x.dtype)


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by halves (Su et al., 2021): (a, b) -> (a cos - b sin, b cos + a sin)."""
    return _Rotary.apply(q_TNH, cos_TH, sin_TH), _Rotary.apply(k_TKH, cos_TH, sin_TH)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    return _SwiGLU.apply(gate, up)


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x * Phi(x), or its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh" if tanh else "none")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        size, w = x.shape[-1], weight.to(scale.dtype)
        product = torch.mul(grad.to(scale.dtype), x).contiguous().view(-1, size)  # what both reductions below read
        d_weight = torch.mv(product.t(), scale.view(-1)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        dot = torch.mv(product, w).view_as(scale)
        d_x = torch.mul(grad, w, out=product.view(x.shape)).mul_(scale)
        d_x.addcmul_(x, dot.mul_(scale.pow(3)).div_(-size))
        return d_x.to(x.dtype), d_weight, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin[:, : sin.shape[-1] // 2].neg(), sin[:, sin.shape[-1] // 2 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _rotate(grad, cos, sin[:, half:], sin[:, :half].neg()), None, None


def _rotate(x: Tensor, cos_TH: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(a, b) -> (a cos + b first, b cos + a second), in the wider dtype, rounded once."""
    half = x.shape[-1] // 2
    source = x.to(wide(x.dtype))
    out = torch.mul(source, cos_TH.unsqueeze(1))
    out[..., :half].addcmul_(source[..., half:], first.unsqueeze(1))
    out[..., half:].addcmul_(source[..., :half], second.unsqueeze(1))
    return out.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.mul(grad, up)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, F.silu(gate).mul_(grad)
