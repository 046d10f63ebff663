"""Layer norm in Triton: one pass forward, one backward, which sums the gradients of weight and bias as it goes (`triton_norm`)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovllm_kernels.triton_launch import programs, rows_of
from nanovllm_kernels.triton_norm import tile
from nanovllm_kernels.triton_sums import column_sums


@triton.jit(do_not_specialize=["rows"])
def _forward(x_ptr, weight_ptr, bias_ptr, out_ptr, rows, stride, eps,
             SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < SIZE)
    x = tl.load(x_ptr + row * stride + column, inside, 0.0).to(tl.float32)
    x = tl.where(inside, x - (tl.sum(x, 1) / SIZE)[:, None], 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < SIZE, 0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (x * weight + bias).to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(x_ptr, weight_ptr, grad_ptr, d_x_ptr, partial_ptr, rows, stride, grad_stride, eps,
              SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        inside = (row < rows) & (column < SIZE)
        x = tl.load(x_ptr + row * stride + column, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, inside, 0.0).to(tl.float32)
        x = tl.where(inside, x - (tl.sum(x, 1) / SIZE)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
        x *= scale
        d_weight += tl.sum(grad * x, 0)
        d_bias += tl.sum(grad, 0)
        grad *= weight
        d_x = scale * (grad - (tl.sum(grad, 1) / SIZE)[:, None] - x * (tl.sum(grad * x, 1) / SIZE)[:, None])
        tl.store(d_x_ptr + row * SIZE + column, d_x.to(d_x_ptr.dtype.element_ty), inside)
    column = tl.arange(0, BLOCK)
    partial = partial_ptr + tl.program_id(0) * 2 * SIZE + column
    tl.store(partial, d_weight, column < SIZE)
    tl.store(partial + SIZE, d_bias, column < SIZE)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        x_RC = rows_of(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            sizes = tile(x.shape[-1])
            _forward[(triton.cdiv(len(x_RC), sizes["ROWS"]),)](
                x_RC, weight, bias, out, len(x_RC), x_RC.stride(0), eps, **sizes
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        x_RC, grad_RC, sizes = rows_of(x), rows_of(grad), tile(x.shape[-1])
        grid = programs(x.device, triton.cdiv(len(x_RC), sizes["ROWS"]))
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial_P2C = torch.empty(grid, 2, x.shape[-1], dtype=torch.float32, device=x.device)
        if grid:
            _backward[(grid,)](
                x_RC, weight, grad_RC, d_x, partial_P2C, len(x_RC), x_RC.stride(0), grad_RC.stride(0), ctx.eps, **sizes
            )
        d_weight, d_bias = column_sums(partial_P2C.flatten(1)).view(2, -1)
        return d_x, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None


def layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last axis (Ba et al., 2016)."""
    return _LayerNorm.apply(x, weight_C, bias_C, eps)
