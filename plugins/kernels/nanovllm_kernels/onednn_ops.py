"""Norm, rotation and SwiGLU in few calls, for a handful of tokens: at one token a call's cost is its being made.

A layer of one token is forty calls of 1 to 5 us in the reference, fifteen here. Nothing is kept for a backward: where
gradients are on, the reference does it. Statistics and rotation are calculated in fp32 and rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm_kernels import torch_ops
from nanovllm_kernels.torch_ops import wide

FEW = 64  # tokens: up to here a copy costs less than a call


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, statistics in fp32."""
    if torch.is_grad_enabled():
        return torch_ops.rms_norm(x, weight_C, eps)
    y = x.to(wide(x.dtype))
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return torch.mul(y, scale).mul_(weight_C).to(x.dtype)


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by halves: x cos + (b, a) (-sin, sin) of the halves (a, b); few tokens' q and k as one tensor."""
    if torch.is_grad_enabled():
        return torch_ops.rotary(q_TNH, k_TKH, cos_TH, sin_TH)
    cos_T1H, sin_T1H = cos_TH.unsqueeze(1), (sin_TH * _signs(sin_TH.shape[-1] // 2)).unsqueeze(1)
    if len(q_TNH) > FEW:
        return _rotated(q_TNH, cos_T1H, sin_T1H), _rotated(k_TKH, cos_T1H, sin_T1H)
    both = _rotated(torch.cat((q_TNH, k_TKH), 1), cos_T1H, sin_T1H)
    q, k = both.split_with_sizes((q_TNH.shape[1], k_TKH.shape[1]), 1)
    return q, k


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch_ops.swiglu(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def _rotated(x: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    y = x.to(wide(x.dtype))
    return y.roll(y.shape[-1] // 2, -1).mul_(sin_T1H).addcmul_(y, cos_T1H).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _signs(half: int) -> Tensor:
    """-1 for the first half, 1 for the second."""
    return torch.ones(2 * half).index_fill_(0, torch.arange(half), -1)
