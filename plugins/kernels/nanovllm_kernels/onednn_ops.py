"""Norm, rotation and SwiGLU in few calls, for a handful of tokens: at one token a call's cost is its being made.

In a model a call of torch costs 2 to 4 us whatever it does: a norm is 3 calls here (7 and an autograd function in the
reference), a rotation of query and key 6 (16 and two). Nothing is kept for a backward: where gradients are on, the
reference does it. Statistics and rotation are calculated in fp32 and rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm_kernels import torch_ops

FEW = 64  # tokens: up to here a copy costs less than a call

_norm = torch.linalg.vector_norm


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, statistics in fp32."""
    if torch.is_grad_enabled():
        return torch_ops.rms_norm(x, weight_C, eps)
    size = x.shape[-1]
    if x.numel() == size and x.dtype == weight_C.dtype:  # one row: its scale is a number
        norm = _norm(x, dtype=torch.float32).item()
        return torch.addcmul(_constant(0.0, x.dtype), x, weight_C, value=(norm * norm / size + eps) ** -0.5)
    y = x.float()
    norm_T1 = _norm(y, dim=-1, keepdim=True)
    scale_T1 = torch.addcmul(_constant(eps, torch.float32), norm_T1, norm_T1, value=1 / size).rsqrt_()
    return torch.mul(y, scale_T1).mul_(weight_C).to(x.dtype)


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by halves: x cos + (b, a) (-sin, sin) of the halves (a, b); few tokens' q and k as one tensor."""
    if torch.is_grad_enabled():
        return torch_ops.rotary(q_TNH, k_TKH, cos_TH, sin_TH)
    cos, sin, tokens = cos_TH, sin_TH * _signs(sin_TH.shape[-1] // 2), q_TNH.shape[0]
    if tokens != 1:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if tokens > FEW:
        return _rotated(q_TNH, cos, sin), _rotated(k_TKH, cos, sin)
    q, k = _rotated(torch.cat((q_TNH, k_TKH), 1), cos, sin).split_with_sizes((q_TNH.shape[1], k_TKH.shape[1]), 1)
    return q, k


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch_ops.swiglu(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def _rotated(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x_TNH.float()
    return y.roll(y.shape[-1] // 2, -1).mul_(sin).addcmul_(y, cos).to(x_TNH.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _signs(half: int) -> Tensor:
    """-1 for the first half, 1 for the second."""
    return torch.ones(2 * half).index_fill_(0, torch.arange(half), -1)
