"""Products of a single row: what generation of one answer is made of, bound by the reading of weights.

A program multiplies some rows of the weight with the whole row, whose norm or SwiGLU it makes for itself: that costs less than a
kernel of its own. On Hopper its weights are on their way to the cache while the kernel before still runs (programmatic dependent
launch, CUDA C++ Programming Guide 12.3, section 4.5).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_kernels.triton_launch import LINE, fetch, launch_early

OUTS = 4  # of a program; measured on an H100 at Qwen3-0.6B's sizes
MOST = 1024  # values of the row at once


@triton.jit
def _sum(x_ptr, more_ptr, place, inside, MORE: tl.constexpr):
    x = tl.load(x_ptr + place, inside, 0.0)
    if MORE:
        x = (x.to(tl.float32) + tl.load(more_ptr + place, inside, 0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _row(x_ptr, more_ptr, norm_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, outs, stride, eps,
         SIZE: tl.constexpr, BLOCK: tl.constexpr, OUTS: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
         NORM: tl.constexpr, MORE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    there = out < outs
    row = weight_ptr + tl.where(there, out, 0).to(tl.int64)[:, None] * stride
    if EARLY:
        gdc_launch_dependents()
        line = tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)
        fetch(row + line[None, :])
        gdc_wait()
    scale = 1.0
    if NORM:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, SIZE, BLOCK):
            place = first + tl.arange(0, BLOCK)
            x = _sum(x_ptr, more_ptr, place, place < SIZE, MORE).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
    found = tl.zeros([OUTS, BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < SIZE
        weight = tl.load(row + place[None, :], there[:, None] & inside[None, :], 0.0)
        if GATED:
            gate, up = tl.load(x_ptr + place, inside, 0.0), tl.load(more_ptr + place, inside, 0.0).to(tl.float32)
            wide = gate.to(tl.float32)
            x = (wide * tl.sigmoid(wide) * up).to(gate.dtype)
        else:
            x = _sum(x_ptr, more_ptr, place, inside, MORE)
        if MORE:
            tl.store(sum_ptr + place, x, inside & (tl.program_id(0) == 0))
        if NORM:
            norm = tl.load(norm_ptr + place, inside, 0.0).to(tl.float32)
            x = (x.to(tl.float32) * scale * norm).to(x.dtype)
        found += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    result = tl.sum(found, 1)
    if BIAS:
        result += tl.load(bias_ptr + out, there, 0.0).to(tl.float32)
    tl.store(out_ptr + out, result.to(out_ptr.dtype.element_ty), there)


def single(x: Tensor, weight_OC: Tensor | None, bias_O: Tensor | None = None) -> bool:
    """Whether x is one row that these kernels take: nothing is to be differentiated, and nothing to be cast."""
    return (
        not torch.is_grad_enabled()
        and x.ndim == 2
        and len(x) == 1
        and weight_OC is not None
        and weight_OC.dtype == x.dtype
        and weight_OC.stride(1) == 1
        and (bias_O is None or (bias_O.dtype == x.dtype and bias_O.is_contiguous()))
    )


def linear_of_one(x_1C: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [1, O]."""
    return _run(x_1C, None, None, 0.0, weight_OC, bias_O)[1]


def norm_linear_of_one(
    x_1C: Tensor, more_1C: Tensor | None, norm_C: Tensor, eps: float, weight_OC: Tensor
) -> tuple[Tensor, Tensor]:
    """x + more, and the product of its RMS norm, [1, O]."""
    return _run(x_1C, more_1C, norm_C.contiguous(), eps, weight_OC, None)


def swiglu_linear_of_one(gate_1I: Tensor, up_1I: Tensor, weight_CI: Tensor, bias_C: Tensor | None) -> Tensor:
    """(silu(gate) * up) @ weight.T + bias, [1, C]."""
    return _run(gate_1I, up_1I, None, 0.0, weight_CI, bias_C, gated=True)[1]


def _run(
    x_1C: Tensor, more_1C: Tensor | None, norm_C: Tensor | None, eps: float, weight_OC: Tensor, bias_O: Tensor | None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + more, and the product."""
    outs, size = weight_OC.shape
    x_1C = x_1C if x_1C.stride(1) == 1 else x_1C.contiguous()
    more_1C = more_1C if more_1C is None or more_1C.stride(1) == 1 else more_1C.contiguous()
    adds = more_1C is not None and not gated
    summed_1C = torch.empty((1, size), dtype=x_1C.dtype, device=x_1C.device) if adds else x_1C
    out_1O = torch.empty((1, outs), dtype=x_1C.dtype, device=x_1C.device)
    line = LINE // x_1C.element_size()
    _row[(triton.cdiv(outs, OUTS),)](
        x_1C, x_1C if more_1C is None else more_1C, x_1C if norm_C is None else norm_C, weight_OC,
        x_1C if bias_O is None else bias_O, summed_1C, out_1O, outs, weight_OC.stride(0), eps,
        SIZE=size, BLOCK=min(MOST, triton.next_power_of_2(size)), OUTS=OUTS, LINES=triton.next_power_of_2(triton.cdiv(size, line)),
        LINE=line, NORM=norm_C is not None, MORE=adds, GATED=gated, BIAS=bias_O is not None, **launch_early(x_1C.device),
    )  # fmt: skip
    return summed_1C, out_1O
