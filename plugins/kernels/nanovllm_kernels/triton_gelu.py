"""GELU in Triton, one pass forward and one backward, computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096  # values of a program


@triton.jit
def _forward(x_ptr, out_ptr, count, BLOCK: tl.constexpr, TANH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count, 0.0).to(tl.float32)
    if TANH:
        out = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(y)) / 2 is sigmoid(2 y)
    else:
        out = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), at < count)


@triton.jit
def _backward(x_ptr, grad_ptr, d_x_ptr, count, BLOCK: tl.constexpr, TANH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, at < count, 0.0).to(tl.float32)
    if TANH:
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        steep = x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        slope = share + tl.where(share * (1 - share) == 0, 0.0, steep)
    else:
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(d_x_ptr + at, (grad * slope).to(d_x_ptr.dtype.element_ty), at < count)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            _forward[(triton.cdiv(out.numel(), BLOCK),)](x.contiguous(), out, out.numel(), BLOCK=BLOCK, TANH=tanh)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if d_x.numel():
            _backward[(triton.cdiv(d_x.numel(), BLOCK),)](
                x.contiguous(), grad.contiguous(), d_x, d_x.numel(), BLOCK=BLOCK, TANH=ctx.tanh
            )
        return d_x, None


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x * Phi(x), or where `tanh` its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    return _Gelu.apply(x, tanh)
