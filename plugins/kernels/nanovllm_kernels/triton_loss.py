"""Linear layer and cross-entropy in one for a GPU: logits of a quarter of the tokens at a time, two passes over them.

The products are torch's. Between them one program takes a row of logits: it finds the largest and the sum of exponentials in
one pass and writes the gradient over the logits in a second, from the row's end, some of which is still in the cache. Gradients are
made in the forward (`torch_loss`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nanovllm_core.contracts import IGNORE
from nanovllm_kernels.products import weight_gradient
from nanovllm_kernels.torch_loss import LinearCrossEntropy

PARTS = 4  # chunks of a batch: fewer hold more logits, more add the weight's gradient more often
ROWS, LOGITS = 1024, 5 * 2**28  # of a chunk: at least these rows, at most these logits (2.7 GB in bf16)
ALIGNED = 64  # columns of logits come in such multiples (W): products into rows of odd sizes are slow
BLOCK = 8192  # logits that a program looks at at once


@triton.jit
def _rows(logits_ptr, target_ptr, loss_ptr, vocabulary, width, IGNORED: tl.constexpr, GRADIENT: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * width
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        inside = first + column < vocabulary
        x = tl.load(logits + first + column, inside, -float("inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    highest = tl.max(top, 0)
    sum_of_all = tl.sum(total * tl.exp(top - highest), 0)
    trained = target != IGNORED
    at = tl.where(trained, target, 0)
    picked = tl.load(logits + at, at < vocabulary, float("nan")).to(tl.float32)  # a target that there is not shows
    tl.store(loss_ptr + row, tl.where(trained, tl.log(sum_of_all) + highest - picked, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        share = tl.where(trained, 1.0, 0.0)
        blocks = tl.cdiv(width, BLOCK)
        for back in range(1, blocks + 1):  # from the end, which was read last
            first = (blocks - back) * BLOCK
            inside = first + column < vocabulary
            x = tl.load(logits + first + column, inside, -float("inf"), eviction_policy="evict_first").to(tl.float32)
            grad = tl.exp(x - highest) / sum_of_all - tl.where(first + column == at, 1.0, 0.0)
            tl.store(logits + first + column, (grad * share).to(logits_ptr.dtype.element_ty), first + column < width)


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of -log softmax(x @ weight.T)[target] over targets that are not IGNORE: a scalar in fp32."""
    return LinearCrossEntropy.apply(_chunked, x_TC, weight_VC, targets_T)


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and the gradients asked for, of a loss gradient of one."""
    tokens, vocabulary = len(x), len(weight)
    width = -(-vocabulary // ALIGNED) * ALIGNED
    cast = weight.to(x.dtype)
    if width > vocabulary:  # their logits are there and count for nothing
        cast = F.pad(cast, (0, 0, 0, width - vocabulary))
    loss_T = torch.empty(tokens, dtype=torch.float32, device=x.device)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    d_weight: Tensor | None = None
    rows = chunk_rows(tokens, width)
    buffer = torch.empty(min(rows, tokens), width, dtype=x.dtype, device=x.device)
    for start in range(0, tokens, rows):
        x_RC, target_R = x[start : start + rows], targets[start : start + rows].contiguous()
        logits_RW = torch.mm(x_RC, cast.t(), out=buffer[: len(x_RC)])
        _rows[(len(x_RC),)](
            logits_RW, target_R, loss_T[start:], vocabulary, width, IGNORED=IGNORE, GRADIENT=needs_x or needs_weight,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=16,
        )  # fmt: skip
        if d_x is not None:
            torch.mm(logits_RW, cast, out=d_x[start : start + rows])
        if needs_weight:
            d_weight = _added(d_weight, logits_RW, x_RC)
    if needs_weight and d_weight is None:
        d_weight = torch.zeros_like(weight)
    return loss_T.sum(), d_x, None if d_weight is None else d_weight[:vocabulary].to(weight.dtype)


def _added(total_WC: Tensor | None, logits_RW: Tensor, x_RC: Tensor) -> Tensor:
    """total + logits.T @ x in fp32, in total's memory."""
    if total_WC is None:
        return weight_gradient(logits_RW, x_RC, torch.float32)
    if logits_RW.is_cuda and logits_RW.dtype == torch.bfloat16:
        return torch.addmm(total_WC, logits_RW.t(), x_RC, out_dtype=torch.float32, out=total_WC)
    return total_WC.add_(logits_RW.t() @ x_RC)


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Rows of a chunk: a multiple of 64 where there may be so many, so that each begins at an address of one class."""
    rows = min(max(ROWS, -(-tokens // PARTS) + 63), LOGITS // vocabulary)
    return rows // 64 * 64 or max(1, rows)
