"""RMS norm and the projections of its result in one operation: their gradients are summed inside the products.

Where several projections read one input, autograd adds up their gradients pass by pass; here each product adds to the one before
it. The residual comes in and goes out through the same operation, so it is added and its gradient is added in the norm's own
passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nanovllm_kernels.products import weight_gradient
from nanovllm_kernels.triton_norm import add_norm, norm_gradients
from nanovllm_kernels.triton_row import norm_linear_of_one, single
from nanovllm_kernels.triton_sums import column_sums


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, norm: Tensor, eps: float, *matrices: Tensor | None
    ) -> tuple[Tensor, ...]:
        summed, normed = add_norm(x, more, norm, eps)
        weights, biases = matrices[::2], matrices[1::2]
        casts = [w.to(x.dtype) for w in weights if w is not None]
        ctx.save_for_backward(summed, norm, normed, *casts)
        ctx.eps, ctx.dtypes = eps, [None if m is None else m.dtype for m in matrices]
        outs = (F.linear(normed, w, None if b is None else b.to(x.dtype)) for w, b in zip(casts, biases, strict=True))
        return summed, *outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed, norm, normed, *casts = ctx.saved_tensors
        d_normed = grads[0] @ casts[0]
        for grad, cast in zip(grads[1:], casts[1:], strict=True):
            d_normed.addmm_(grad, cast)
        found: list[Tensor | None] = []
        for i, grad in enumerate(grads):
            weight_dtype, bias_dtype = ctx.dtypes[2 * i : 2 * i + 2]
            found.append(weight_gradient(grad, normed, weight_dtype) if ctx.needs_input_grad[4 + 2 * i] else None)
            found.append(column_sums(grad).to(bias_dtype) if ctx.needs_input_grad[5 + 2 * i] else None)
        d_x, d_norm = norm_gradients(summed, norm, ctx.eps, d_normed, residual)
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_norm, None, *found


def norm_linear(
    x_TC: Tensor, more_TC: Tensor | None, norm_C: Tensor, eps: float, *matrices: Tensor | None
) -> tuple[Tensor, ...]:
    """x + more, then the products of its RMS norm with each weight: `matrices` are weight_OC, bias_O | None, ..."""
    if not torch.is_grad_enabled():
        whole_OC = _side_by_side(matrices[::2]) if not any(b is not None for b in matrices[1::2]) else None
        if whole_OC is not None and whole_OC.dtype == x_TC.dtype:
            if single(x_TC, whole_OC):
                summed_TC, out_TO = norm_linear_of_one(x_TC, more_TC, norm_C, eps, whole_OC)
            else:
                summed_TC, normed_TC = add_norm(x_TC, more_TC, norm_C, eps)
                out_TO = F.linear(normed_TC, whole_OC)
            return summed_TC, *out_TO.split([len(w) for w in matrices[::2] if w is not None], dim=1)
    return _NormLinear.apply(x_TC, more_TC, norm_C, eps, *matrices)


def _side_by_side(weights: Sequence[Tensor | None]) -> Tensor | None:
    """Weights that follow each other in one memory as one [O, C]; None where they do not (`assemble` lays them so to generate)."""
    first, *others = weights
    assert first is not None
    end, rows = first.data_ptr() + first.nbytes, len(first)
    for weight in (first, *others):
        if (
            weight is None
            or not weight.is_contiguous()
            or weight.dtype != first.dtype
            or weight.shape[1] != first.shape[1]
        ):
            return None
    for weight in others:
        assert weight is not None
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end, rows = end + weight.nbytes, rows + len(weight)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
