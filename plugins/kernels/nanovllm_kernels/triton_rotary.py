"""Rotation of query and key heads in Triton, the norm of each head before it in the same pass where a model has one.

A tile is all heads of some tokens, so that a token's angles are read once; a head is held as its two halves, which the rotation
mixes. Cosines and sines are the same in both halves (`contracts.Ops.rotary`), so only the first is read. The backward makes the
norm's statistic again from its input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovllm_kernels.triton_launch import begin, launch_early, programs
from nanovllm_kernels.triton_sums import column_sums

VALUES = 4096  # of a tile, of which each thread holds 32


@triton.jit
def _rotate(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, tokens, token_stride, head_stride, angle_stride, eps,
            N: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    token = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None, None].to(tl.int64)
    head, column = tl.arange(0, HEADS)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    angle = token * angle_stride + column
    known = (token < tokens) & (column < HALF)
    inside = known & (head < N)
    x = x_ptr + token * token_stride + head * head_stride + column
    a = tl.load(x, inside, 0.0).to(tl.float32)
    b = tl.load(x + HALF, inside, 0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, 2) / (2 * HALF) + eps)[:, :, None]
        a = a * scale * tl.load(weight_ptr + column, column < HALF, 0.0).to(tl.float32)
        b = b * scale * tl.load(weight_ptr + HALF + column, column < HALF, 0.0).to(tl.float32)
    cos, sin = tl.load(cos_ptr + angle, known, 0.0), tl.load(sin_ptr + angle, known, 0.0)
    out = out_ptr + (token * N + head) * (2 * HALF) + column
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), inside)
    tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def _forward(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, tokens, token_stride, head_stride, angle_stride, eps,
             N: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
             NORM: tl.constexpr):  # fmt: skip
    _rotate(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, tokens, token_stride, head_stride, angle_stride, eps,
            N, HALF, TILE, HEADS, BLOCK, NORM)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _both(q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens,
          q_token_stride, k_token_stride, q_head_stride, k_head_stride, angle_stride, eps,
          N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr,
          NORM: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    begin(EARLY)
    if tl.program_id(1) == 0:
        _rotate(q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, tokens, q_token_stride, q_head_stride, angle_stride, eps,
                N, HALF, 1, HEADS, BLOCK, NORM)  # fmt: skip
    else:
        _rotate(k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, tokens, k_token_stride, k_head_stride, angle_stride, eps,
                K, HALF, 1, K_HEADS, BLOCK, NORM)  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _backward(x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_ptr, d_x_ptr, partial_ptr, tokens, token_stride, head_stride,
              grad_token_stride, grad_head_stride, angle_stride, eps,
              N: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
              NORM: tl.constexpr):  # fmt: skip
    head, column = tl.arange(0, HEADS)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    if NORM:
        weight_a = tl.load(weight_ptr + column, column < HALF, 0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + HALF + column, column < HALF, 0.0).to(tl.float32)
        d_weight_a = tl.zeros([HEADS, BLOCK], tl.float32)
        d_weight_b = tl.zeros([HEADS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * TILE, tokens, tl.num_programs(0) * TILE):
        token = (first + tl.arange(0, TILE))[:, None, None].to(tl.int64)
        angle = token * angle_stride + column
        known = (token < tokens) & (column < HALF)
        inside = known & (head < N)
        grad = grad_ptr + token * grad_token_stride + head * grad_head_stride + column
        grad_a = tl.load(grad, inside, 0.0).to(tl.float32)
        grad_b = tl.load(grad + HALF, inside, 0.0).to(tl.float32)
        cos, sin = tl.load(cos_ptr + angle, known, 0.0), tl.load(sin_ptr + angle, known, 0.0)
        d_a = grad_a * cos + grad_b * sin
        d_b = grad_b * cos - grad_a * sin
        if NORM:
            x = x_ptr + token * token_stride + head * head_stride + column
            a = tl.load(x, inside, 0.0).to(tl.float32)
            b = tl.load(x + HALF, inside, 0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(a * a + b * b, 2) / (2 * HALF) + eps)[:, :, None]
            a *= scale
            b *= scale
            d_weight_a += tl.sum(d_a * a, 0)
            d_weight_b += tl.sum(d_b * b, 0)
            d_a *= weight_a
            d_b *= weight_b
            along = (tl.sum(d_a * a + d_b * b, 2) / (2 * HALF))[:, :, None]
            d_a = scale * (d_a - a * along)
            d_b = scale * (d_b - b * along)
        out = d_x_ptr + (token * N + head) * (2 * HALF) + column
        tl.store(out, d_a.to(d_x_ptr.dtype.element_ty), inside)
        tl.store(out + HALF, d_b.to(d_x_ptr.dtype.element_ty), inside)
    if NORM:
        column = tl.arange(0, BLOCK)
        partial = partial_ptr + tl.program_id(0) * (2 * HALF) + column
        tl.store(partial, tl.sum(d_weight_a, 0), column < HALF)
        tl.store(partial + HALF, tl.sum(d_weight_b, 0), column < HALF)


class _Rotated(torch.autograd.Function):
    """(x_TNH, weight_H | None, eps, cos_TH, sin_TH) -> normed, where there is a weight, and rotated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        x, cos, sin = _heads(x), _angles(cos), _angles(sin)
        weight = None if weight is None else weight.contiguous()
        ctx.save_for_backward(*((cos, sin) if weight is None else (cos, sin, x, weight)))
        ctx.eps = eps
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            sizes = _tile(x)
            _forward[(triton.cdiv(len(x), sizes["TILE"]),)](
                x, x if weight is None else weight, cos, sin, out, len(x), x.stride(0), x.stride(1), cos.stride(0), eps,
                NORM=weight is not None, **sizes,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        cos, sin, *normed = ctx.saved_tensors
        grad = _heads(grad)
        x, weight = normed or (grad, None)
        sizes = _tile(grad)
        grid = programs(grad.device, triton.cdiv(len(grad), sizes["TILE"]))
        d_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        partial = torch.empty(grid, grad.shape[2] if normed else 1, dtype=torch.float32, device=grad.device)
        if grid:
            _backward[(grid,)](
                x, grad if weight is None else weight, cos, sin, grad, d_x, partial, len(grad), x.stride(0), x.stride(1),
                grad.stride(0), grad.stride(1), cos.stride(0), ctx.eps, NORM=weight is not None, **sizes,
            )  # fmt: skip
        return d_x, None if weight is None else column_sums(partial).to(weight.dtype), None, None, None


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated by halves (Su et al., 2021): (a, b) -> (a cos - b sin, b cos + a sin)."""
    if not torch.is_grad_enabled():
        return _together(q_TNH, k_TKH, None, None, 0.0, cos_TH, sin_TH)
    return _Rotated.apply(q_TNH, None, 0.0, cos_TH, sin_TH), _Rotated.apply(k_TKH, None, 0.0, cos_TH, sin_TH)


def norm_rotary(
    q_TNH: Tensor, k_TKH: Tensor, q_norm_H: Tensor, k_norm_H: Tensor, eps: float, cos_TH: Tensor, sin_TH: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS norm of each head, then the rotation, rounded once."""
    if not torch.is_grad_enabled():
        return _together(q_TNH, k_TKH, q_norm_H, k_norm_H, eps, cos_TH, sin_TH)
    return (
        _Rotated.apply(q_TNH, q_norm_H, eps, cos_TH, sin_TH),
        _Rotated.apply(k_TKH, k_norm_H, eps, cos_TH, sin_TH),
    )


def _together(
    q: Tensor, k: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Both in one launch, a token a program: nothing is kept for a backward."""
    q, k, cos, sin = _heads(q), _heads(k), _angles(cos), _angles(sin)
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if len(q):
        heads, k_heads = _tile(q), _tile(k)
        norms = [x if norm is None else norm.contiguous() for x, norm in ((q, q_norm), (k, k_norm))]
        _both[(len(q), 2)](
            q, k, *norms, cos, sin, *outs, len(q), q.stride(0), k.stride(0), q.stride(1), k.stride(1), cos.stride(0), eps,
            N=q.shape[1], K=k.shape[1], HALF=heads["HALF"], HEADS=heads["HEADS"], K_HEADS=k_heads["HEADS"],
            BLOCK=heads["BLOCK"], NORM=q_norm is not None, num_warps=4, **launch_early(q.device),
        )  # fmt: skip
    return outs[0], outs[1]


def _heads(x_TNH: Tensor) -> Tensor:
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


def _angles(x_TH: Tensor) -> Tensor:
    return x_TH.contiguous()  # cosines and sines have one stride


def _tile(x_TNH: Tensor) -> dict[str, int]:
    """The sizes of a head and of a tile: powers of two."""
    _, n, size = x_TNH.shape
    heads, block = triton.next_power_of_2(n), triton.next_power_of_2(size // 2)
    tile = max(1, VALUES // (2 * heads * block))
    return {
        "N": n,
        "HALF": size // 2,
        "TILE": tile,
        "HEADS": heads,
        "BLOCK": block,
        "num_warps": _warps(tile * heads * block),
    }


def _warps(values: int) -> int:
    return min(16, max(4, values // 256))
