"""Matrix products of bf16 activations with fp32 master weights, whose gradients leave the product in fp32.

The product sums in fp32 anyway; to round the sum to bf16 and make it fp32 afterwards costs a pass and the digits. torch has
such a product for CUDA alone (`torch.mm(..., out_dtype=)`, 2.8); elsewhere the sum is rounded and cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanovllm_kernels.triton_row import linear_of_one, single
from nanovllm_kernels.triton_sums import column_sums

MANY = 1 << 15  # outputs from which on cuBLAS reads weights as fast as the memory gives them


def weight_gradient(grad_TO: Tensor, x_TI: Tensor, dtype: torch.dtype) -> Tensor:
    """grad.T @ x in the weight's dtype."""
    if grad_TO.is_cuda and dtype == torch.float32 and grad_TO.dtype == torch.bfloat16:
        return torch.mm(grad_TO.t(), x_TI, out_dtype=dtype)
    return (grad_TO.t() @ x_TI).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.transposed = weight.stride(0) == 1 < weight.stride(1)  # as GPT-2's: its gradient stands as it does
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        d_x = grad @ cast if ctx.needs_input_grad[0] else None
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            turned = ctx.transposed
            d_weight = weight_gradient(x, grad, weight_dtype).t() if turned else weight_gradient(grad, x, weight_dtype)
        if ctx.needs_input_grad[2]:
            d_bias = column_sums(grad).to(bias_dtype)
        return d_x, d_weight, d_bias


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype; the weight's gradient in the weight's."""
    if single(x, weight_OI, bias_O) and len(weight_OI) <= MANY:
        return linear_of_one(x, weight_OI, bias_O)
    if x.ndim == 2:
        return _Linear.apply(x, weight_OI, bias_O)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)
