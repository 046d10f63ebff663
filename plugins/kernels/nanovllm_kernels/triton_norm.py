"""RMS norm in Triton, with the residual's addition before it and the residual's gradient after it in the same pass.

A norm and the addition are bound by memory: each tensor is read once and written once. The backward keeps no statistic, it
makes them again from the input that it reads anyway, and its programs walk over many rows each, so that the weight's gradient
is summed in registers and only some hundred partial rows are left to add (all in fp32, in one order).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovllm_kernels.triton_launch import begin, launch_early, programs, rows_of
from nanovllm_kernels.triton_sums import column_sums

VALUES = 2048  # of a tile: rows that a program holds at once x the row's size


@triton.jit(do_not_specialize=["rows"])
def _forward(x_ptr, more_ptr, weight_ptr, sum_ptr, out_ptr, rows, x_stride, more_stride, eps,
             SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    begin(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < SIZE)
    at = row.to(tl.int64)
    x = tl.load(x_ptr + at * x_stride + column, inside, 0.0)
    if MORE:
        x = (x.to(tl.float32) + tl.load(more_ptr + at * more_stride + column, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at * SIZE + column, x, inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    tl.store(out_ptr + at * SIZE + column, (x * scale[:, None] * weight).to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(x_ptr, weight_ptr, grad_ptr, residual_ptr, d_x_ptr, partial_ptr, rows, x_stride, grad_stride, residual_stride,
              eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < SIZE, 0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < SIZE)
        at = row.to(tl.int64)
        x = tl.load(x_ptr + at * x_stride + column, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at * grad_stride + column, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None]
        normed = x * scale
        d_weight += tl.sum(grad * normed, 0)
        grad *= weight
        d_x = scale * (grad - normed * (tl.sum(grad * normed, 1) / SIZE)[:, None])
        if RESIDUAL:
            d_x += tl.load(residual_ptr + at * residual_stride + column, inside, 0.0).to(tl.float32)
        tl.store(d_x_ptr + at * SIZE + column, d_x.to(d_x_ptr.dtype.element_ty), inside)
    column = tl.arange(0, BLOCK)
    tl.store(partial_ptr + tl.program_id(0) * SIZE + column, d_weight, column < SIZE)


def add_norm(x: Tensor, more: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more (x itself without it), and the norm of that."""
    size, weight_C = x.shape[-1], weight_C.contiguous()
    x_RC = rows_of(x)
    more_RC = x_RC if more is None else rows_of(more)
    summed = x if more is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        sizes = tile(size)
        _forward[(triton.cdiv(len(x_RC), sizes["ROWS"]),)](
            x_RC, more_RC, weight_C, summed, out, len(x_RC), x_RC.stride(0), more_RC.stride(0), eps, MORE=more is not None,
            **sizes, **launch_early(x.device),
        )  # fmt: skip
    return summed, out


def norm_gradients(
    x: Tensor, weight_C: Tensor, eps: float, grad: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of the norm's input, `residual` added, and of its weight in the weight's dtype."""
    size, weight_C = x.shape[-1], weight_C.contiguous()
    x_RC, grad_RC = rows_of(x), rows_of(grad)
    residual_RC = grad_RC if residual is None else rows_of(residual)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = tile(size)
    grid = programs(x.device, triton.cdiv(len(x_RC), sizes["ROWS"]))
    partial_PC = torch.empty(grid, size, dtype=torch.float32, device=x.device)
    if grid:
        _backward[(grid,)](
            x_RC, weight_C, grad_RC, residual_RC, d_x, partial_PC, len(x_RC), x_RC.stride(0), grad_RC.stride(0),
            residual_RC.stride(0), eps, RESIDUAL=residual is not None, **sizes,
        )  # fmt: skip
    return d_x, column_sums(partial_PC).to(weight_C.dtype)


class RmsNorm(torch.autograd.Function):
    """(x, weight_C, eps) -> norm, over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_C)
        ctx.eps = eps
        return add_norm(x, None, weight_C, eps)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_C = ctx.saved_tensors
        return *norm_gradients(x, weight_C, ctx.eps, grad), None


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019)."""
    return RmsNorm.apply(x, weight_C, eps)


def tile(size: int) -> dict[str, int]:
    """The size of a row, and columns and rows of a tile: powers of two."""
    block = triton.next_power_of_2(size)
    rows = max(1, VALUES // block)
    return {"SIZE": size, "BLOCK": block, "ROWS": rows, "num_warps": min(16, max(4, block * rows // 512))}
