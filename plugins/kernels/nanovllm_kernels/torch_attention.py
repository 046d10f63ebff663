"""Attention over packed documents, through torch's scaled_dot_product_attention.

Documents are laid as rows of a batch: at once when all have one length (no copy), else in groups of like length,
padded at the end to the longest of the group. A causal query never sees what comes after it, so the padding needs no
mask, and no value crosses a document's border. A group's lengths differ by at most an eighth (or 8 tokens), which
bounds the waste; a mask over the packed batch would cost attention of all tokens to all. A sliding window is only looked
at where a document is longer (`torch_causal`): to the others it is the whole past.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nanovllm_core.contracts import Batch
from nanovllm_kernels.torch_causal import BlockwiseCausal

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
COMMON = 256  # lengths that are multiples of this are met again
SLACK = 8  # lengths of a group differ by 8 tokens or by an eighth


def attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, window: int | None = None) -> Tensor:
    """Causal attention within each document, [T, N, H].

    With `window` a token sees itself and the window - 1 tokens before it (Child et al., 2019; Jiang et al., 2023).
    """
    return documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)


def documents(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    if not lengths:
        return q_TNH.clone()
    if len(set(lengths)) == 1:
        return _causal(q_TNH, k_TKH, v_TKH, len(lengths), window, suits_cudnn(q_TNH, lengths))
    plan = _plan(lengths, q_TNH.device)
    spread = (_Spread.apply(x, plan.index_T, sum(plan.rows)).split(plan.rows) for x in (q_TNH, k_TKH, v_TKH))
    grouped = [_causal(q, k, v, n, window) for q, k, v, n in zip(*spread, plan.documents, strict=True)]
    return _Collect.apply(torch.cat(grouped), plan.index_T)


def _causal(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: int, window: int | None, cudnn: bool = False
) -> Tensor:
    """`documents` documents of one length, end to end."""
    slides = window is not None and window < len(q_TNH) // documents
    q_DLNH, k_DLKH, v_DLKH = (x.view(documents, -1, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH))
    if slides or (q_TNH.device.type == "cpu" and q_TNH.dtype == torch.bfloat16):
        return BlockwiseCausal.apply(q_DLNH, k_DLKH, v_DLKH, window if slides else None).view(q_TNH.shape)
    q, k, v = (x.transpose(1, 2) for x in (q_DLNH, k_DLKH, v_DLKH))
    with sdpa_kernel(ORDER, set_priority=True) if cudnn else nullcontext():
        o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).reshape(q_TNH.shape)


def suits_cudnn(q_TNH: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether cuDNN's kernel is the one for these documents: on an H100 it takes 64 ms where FlashAttention 2 takes 110.

    For each size it builds a plan, a tenth of a second, so only sizes that a run meets again and again are handed to it.
    """
    if not q_TNH.is_cuda or q_TNH.dtype != torch.bfloat16 or torch.are_deterministic_algorithms_enabled():
        return False
    return met_again(lengths)


def met_again(lengths: tuple[int, ...]) -> bool:
    """Whether a run meets batches like this one again and again: documents of one length, a common one."""
    return len(set(lengths)) == 1 and not lengths[0] % COMMON


@frozen(eq=False)
class _Plan:
    """Where tokens stand when documents are laid out in groups of like length, each padded to its longest."""

    index_T: Tensor  # token -> row
    rows: tuple[int, ...]  # of each group
    documents: tuple[int, ...]  # in each group


@lru_cache(maxsize=4)  # all layers of a forward ask for the same one
@torch.inference_mode(False)  # training may ask for what an evaluation made, and could not save an inference tensor
def _plan(lengths: tuple[int, ...], device: torch.device) -> _Plan:
    by_length = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    groups: list[list[int]] = []
    for d in by_length:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest - lengths[d] <= max(SLACK, longest // SLACK):
            groups[-1].append(d)
        else:
            groups.append([d])
    first_row, total = [0] * len(lengths), 0
    for group in groups:
        for d in group:
            first_row[d], total = total, total + lengths[group[0]]
    length_D = torch.tensor(lengths)
    shift_D = torch.tensor(first_row) - (length_D.cumsum(0) - length_D)  # from a token's place to its row
    index_T = torch.arange(int(length_D.sum())) + shift_D.repeat_interleave(length_D)
    rows = tuple(lengths[g[0]] * len(g) for g in groups)
    return _Plan(index_T.to(device), rows, tuple(len(g) for g in groups))


class _Spread(torch.autograd.Function):
    """Tokens to their rows; rows without a token are zero. Rows are distinct, so the backward only collects them."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, index_T: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index_T)
        return x_T.new_zeros(rows, *x_T.shape[1:]).index_copy_(0, index_T, x_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index_T,) = ctx.saved_tensors
        return _Collect.apply(grad, index_T), None, None


class _Collect(torch.autograd.Function):
    """Rows back to tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.rows = x.shape[0]
        return x.index_select(0, index_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        return _Spread.apply(grad_T, index_T, ctx.rows), None
