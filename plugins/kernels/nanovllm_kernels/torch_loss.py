"""Linear layer and cross-entropy in one, in chunks of rows: all logits at once never exist.

For 4,096 tokens and 8,192 rows of vocabulary all logits are 134 MB in fp32, and their softmax, its gradient and
autograd's copies as much again; here two buffers of one chunk serve the whole batch and stay in the processor's cache.
The gradients of x and weight are computed during the forward, while a chunk's probabilities are at hand, so logits are
made once; that costs holding the weight's gradient (fp32) until the backward. It cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovllm_core.contracts import IGNORE
from nanovllm_kernels.torch_ops import wide

CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits of a chunk: 8 MiB in fp32 stay in a CPU's cache, 512 MiB feed a GPU
MIN_ROWS, MAX_ROWS = 64, 1024


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of -log softmax(x @ weight.T)[target] over targets that are not IGNORE: a scalar in fp32."""
    return LinearCrossEntropy.apply(_chunked, x_TC, weight_VC, targets_T)


Chunked = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor | None, Tensor | None]]


class LinearCrossEntropy(torch.autograd.Function):
    """Of a function that makes the loss and, as asked, the gradients of x and weight for a loss gradient of one."""

    @staticmethod
    def forward(ctx: Any, chunked: Chunked, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss, d_x, d_weight = chunked(x, weight, targets, *ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x, weight, targets)
        ctx.chunked, ctx.gradients = chunked, (d_x, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:  # a second backward of a retained graph: the first took its gradients away
            ctx.gradients = ctx.chunked(*ctx.saved_tensors, *ctx.needs_input_grad[1:3])[1:]
        d_x, d_weight = ctx.gradients
        ctx.gradients = None
        return None, None if d_x is None else d_x.mul_(grad), None if d_weight is None else d_weight.mul_(grad), None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and the gradients asked for, of a loss gradient of one."""
    vocab, high = weight.shape[0], wide(x.dtype)
    w = weight.to(x.dtype)
    loss = torch.zeros((), dtype=high, device=x.device)
    d_x = torch.zeros_like(x) if needs_x else None
    d_weight = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=x.device) if needs_weight else None
    kept: Tensor | None = None
    if x.device.type == "cpu" and (targets == IGNORE).any():  # asking costs a GPU a wait, so there rows are masked
        kept = (targets != IGNORE).nonzero().squeeze(1)
        x, targets = x[kept], targets[kept]
    rows = _rows(x.shape[0], vocab, x.device.type)
    logits_buffer = torch.empty(rows, vocab, dtype=x.dtype, device=x.device)
    probs_buffer = logits_buffer if x.dtype == high else torch.empty(rows, vocab, dtype=high, device=x.device)
    for start in range(0, x.shape[0], max(1, rows)):
        x_RC, target_R1 = x[start : start + rows], targets[start : start + rows].unsqueeze(1)
        logits_RV = torch.mm(x_RC, w.t(), out=logits_buffer[: len(x_RC)])
        trained_R1 = target_R1 != IGNORE
        target_R1 = target_R1.clamp_min(0)
        picked_R1 = logits_RV.gather(1, target_R1).to(high)
        top_R1 = logits_RV.amax(1, keepdim=True).to(high)
        probs_RV = torch.softmax(logits_RV, 1, dtype=high, out=probs_buffer[: len(x_RC)])
        # The largest probability is exp(top - logsumexp), at least 1/V: its logarithm is exact where others underflow.
        losses_R1 = top_R1 - probs_RV.amax(1, keepdim=True).log_() - picked_R1
        loss += losses_R1.masked_fill_(~trained_R1, 0).sum()
        if not (needs_x or needs_weight):
            continue
        probs_RV.scatter_add_(1, target_R1, torch.full_like(losses_R1, -1))
        if x.device.type != "cpu":
            probs_RV.mul_(trained_R1)
        d_logits_RV = probs_RV if x.dtype == high else logits_RV.copy_(probs_RV)
        if d_x is not None:
            d_rows = torch.mm(d_logits_RV, w)
            if kept is None:
                d_x[start : start + rows] = d_rows
            else:
                d_x.index_copy_(0, kept[start : start + rows], d_rows)
        if d_weight is not None:
            if d_weight.dtype == x.dtype:
                d_weight.addmm_(d_logits_RV.t(), x_RC)
            else:
                d_weight.add_(torch.mm(d_logits_RV.t(), x_RC))
    return loss, d_x, None if d_weight is None else d_weight.to(weight.dtype)


def _rows(total: int, vocab: int, device: str) -> int:
    """Rows of a chunk: as many as fit, in chunks of nearly one size."""
    most = min(MAX_ROWS, max(MIN_ROWS, CHUNK.get(device, CHUNK["cuda"]) // vocab))
    chunks = -(-total // most)
    return -(-total // max(1, chunks))
