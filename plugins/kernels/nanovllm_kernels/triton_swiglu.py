"""SwiGLU in Triton, and with the projection behind it in one: then its product is not kept but made again in the backward.

The product silu(gate) * up is as large as gate or up, and the backward reads both anyway: making it again there costs one more
write in a pass that has three reads and two, and saves a third of what the MLP keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanovllm_kernels.products import weight_gradient
from nanovllm_kernels.triton_launch import rows_of
from nanovllm_kernels.triton_row import single, swiglu_linear_of_one
from nanovllm_kernels.triton_sums import column_sums

BLOCK = 4096  # values of a program


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_ptr + row * gate_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(gate_ptr, up_ptr, grad_ptr, d_gate_ptr, d_up_ptr, out_ptr, count, BLOCK: tl.constexpr, OUT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + at, inside, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = d_gate_ptr.dtype.element_ty
    tl.store(d_gate_ptr + at, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(kind), inside)
    tl.store(d_up_ptr + at, (grad * silu).to(kind), inside)
    if OUT:
        tl.store(out_ptr + at, (silu * up).to(kind), inside)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gate_RI, up_RI, size = rows_of(gate), rows_of(up), gate.shape[-1]
        block = min(BLOCK, triton.next_power_of_2(size))
        _forward[(len(gate_RI), triton.cdiv(size, block))](
            gate_RI,
            up_RI,
            out,
            gate_RI.stride(0),
            up_RI.stride(0),
            SIZE=size,
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
    return out


def gradients(gate: Tensor, up: Tensor, grad: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of gate and up; and, where it is asked `again`, the product."""
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    out = torch.empty_like(d_gate) if again else d_gate
    if out.numel():
        _backward[(triton.cdiv(out.numel(), BLOCK),)](
            gate.contiguous(), up.contiguous(), grad.contiguous(), d_gate, d_up, out, out.numel(), BLOCK=BLOCK, OUT=again,
            num_warps=8,
        )  # fmt: skip
    return d_gate, d_up, out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return gradients(*ctx.saved_tensors, grad, again=False)[:2]


Found = list[Tensor | None]
"""Gradients of weight and bias: empty, until one node of a backward leaves them for the next."""


class _Hold(torch.autograd.Function):
    """Keeps what the backward needs, computes nothing, and hands gate and up on.

    A block that is computed again for its backward (`gradient_checkpointing`) is over once all is there that was kept: as this
    node keeps everything and stands before the product, neither the product nor the projection is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, found: Found, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, cast: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up, cast)
        ctx.found, ctx.dtypes = found, (weight.dtype, None if bias is None else bias.dtype)
        return gate, up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gate: Tensor, d_up: Tensor) -> tuple[Tensor | None, ...]:
        d_bias, d_weight = ctx.found.pop(), ctx.found.pop()
        return None, d_gate, d_up, d_weight, d_bias, None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, held: Any, found: Found, gate: Tensor, up: Tensor, cast: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.held, ctx.found = held, found
        return F.linear(product(gate, up), cast, None if bias is None else bias.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.held
        gate, up, cast = held.saved_tensors
        weight_dtype, bias_dtype = held.dtypes
        d_gate, d_up, out = gradients(gate, up, grad @ cast, again=True)
        d_weight = weight_gradient(grad, out, weight_dtype) if held.needs_input_grad[3] else None
        d_bias = column_sums(grad).to(bias_dtype) if held.needs_input_grad[4] else None
        ctx.found += (d_weight, d_bias)
        return None, None, d_gate, d_up, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020), rounded once."""
    return _SwiGLU.apply(gate, up)


def swiglu_linear(gate_TI: Tensor, up_TI: Tensor, weight_CI: Tensor, bias_C: Tensor | None) -> Tensor:
    """(silu(gate) * up) @ weight.T + bias."""
    if single(gate_TI, weight_CI, bias_C):
        return swiglu_linear_of_one(gate_TI, up_TI, weight_CI, bias_C)
    if not torch.is_grad_enabled():
        cast = weight_CI.to(gate_TI.dtype)
        return F.linear(product(gate_TI, up_TI), cast, None if bias_C is None else bias_C.to(gate_TI.dtype))
    found: Found = []
    cast = weight_CI.detach().to(gate_TI.dtype)
    gate_TI, up_TI = _Hold.apply(found, gate_TI, up_TI, weight_CI, bias_C, cast)
    return _SwiGLULinear.apply(
        gate_TI.grad_fn, found, gate_TI, up_TI, cast, None if bias_C is None else bias_C.detach()
    )
