"""Causal attention of documents of one length in blocks of queries, from batched matmuls; also in a sliding window.

It serves two cases. In bf16 on a CPU torch's own kernel splits keys by 512, so up to that length it computes the half
that the mask throws away, and it gets less out of a CPU's bf16 instructions than a plain matmul does. Forward and
backward of 8 documents of 512 tokens, 4 query heads of 64 over 2 key heads, on 2 cores: 26 ms instead of 50 (Zen 4), 24
instead of 35 (Sapphire Rapids). In fp32 the gain is a tenth and goes with longer documents, so fp32 stays with torch's
kernel. And with a window shorter than the documents, on any device: torch's kernels would need a mask of all tokens by
all tokens and compute what it hides; here a block of queries meets only the keys that its window reaches. A document of
4,096 tokens, same heads, forward and backward on one core: 106 ms in fp32 and 75 in bf16 with a window of 512, 236 and
196 without (a CPU with AMX).

Scores exist for one block of queries at a time and are made again in the backward. Query heads that share a key head
stand as further rows of one matmul, so keys and values are never repeated. What it costs: in bf16 a score is rounded
before its softmax (which is fp32 inside), as eager attention in `transformers` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = {"cpu": 128, "cuda": 512}  # of a block: half of its last scores are masked away, and of its first in a window
SCORES = {"cpu": 2**22, "cuda": 2**27}  # scores that exist at once: documents are taken in portions


class BlockwiseCausal(torch.autograd.Function):
    """(q_DLNH, k_DLKH, v_DLKH, window) -> o_DLNH, for D documents of L tokens each; window None: all L."""

    @staticmethod
    def forward(ctx: Any, q_DLNH: Tensor, k_DLKH: Tensor, v_DLKH: Tensor, window: int | None) -> Tensor:
        ctx.save_for_backward(q_DLNH, k_DLKH, v_DLKH)
        ctx.window = window = min(window or q_DLNH.shape[1], q_DLNH.shape[1])
        out_DLNH = torch.empty_like(q_DLNH, memory_format=torch.contiguous_format)
        for q, k, v, out in _portions(window, q_DLNH, k_DLKH, v_DLKH, out_DLNH):
            keys, values, masks = _scaled_keys(k), _by_head(v), _masks(q)
            for first, start, end in _blocks(q, window):
                probs = _probabilities(_rows(q[:, start:end], k), keys[:, first:end], masks, end - start, window)
                _put(out[:, start:end], torch.bmm(probs, values[:, first:end]), k)
        return out_DLNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DLNH: Tensor) -> tuple[Tensor | None, ...]:
        inputs, window = ctx.saved_tensors, ctx.window
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for q, k, v, grad, d_q, d_k, d_v in _portions(window, *inputs, grad_DLNH, *grads):
            keys, values, masks = _scaled_keys(k), _by_head(v), _masks(q)
            # Sums over blocks of queries are kept in fp32, or fp64.
            sum_k, sum_v = (
                torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
            )
            for first, start, end in _blocks(q, window):
                q_rows, grad_rows = _rows(q[:, start:end], k), _rows(grad[:, start:end], k)
                probs = _probabilities(q_rows, keys[:, first:end], masks, end - start, window)
                _add(sum_v[:, first:end], probs, grad_rows)
                d_probs = torch.bmm(grad_rows, values[:, first:end].transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
                _put(d_q[:, start:end], torch.bmm(d_scores, keys[:, first:end]), k)
                _add(sum_k[:, first:end], d_scores, q_rows)
            _put(d_k, sum_k.mul_(q.shape[3] ** -0.5), k)
            _put(d_v, sum_v, k)
        return *grads, None


def _portions(window: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Some documents of every tensor at a time; the first is q."""
    documents, length, heads, _ = tensors[0].shape
    device = tensors[0].device.type
    block = min(length, QUERIES[device])
    portion = max(1, SCORES[device] // (heads * block * min(length, window - 1 + block)))
    for start in range(0, documents, portion):
        yield [x[start : start + portion] for x in tensors]


def _blocks(q_DLNH: Tensor, window: int) -> Iterator[tuple[int, int, int]]:
    """First key, first query and end of both, of each block."""
    length, size = q_DLNH.shape[1], QUERIES[q_DLNH.device.type]
    for start in range(0, length, size):
        yield max(0, start - window + 1), start, min(start + size, length)


def _by_head(x_DLKH: Tensor) -> Tensor:
    """[D * K, L, H]"""
    return x_DLKH.transpose(1, 2).flatten(0, 1).contiguous()


def _scaled_keys(k_DLKH: Tensor) -> Tensor:
    return _by_head(k_DLKH * k_DLKH.shape[3] ** -0.5)


def _masks(q_DLNH: Tensor) -> tuple[Tensor, Tensor]:
    """-inf where a query's key comes later, and where it is too old, each with the first such key at a corner."""
    size = min(QUERIES[q_DLNH.device.type], q_DLNH.shape[1])
    hidden = torch.full((size, size), -torch.inf, dtype=q_DLNH.dtype, device=q_DLNH.device)
    return hidden.triu(1), hidden.tril()


def _rows(x_DBNH: Tensor, k_DLKH: Tensor) -> Tensor:
    """[D * K, G * B, H]: the G query heads of each key head."""
    d, b, n, h = x_DBNH.shape
    kv_heads = k_DLKH.shape[2]
    return x_DBNH.view(d, b, kv_heads, n // kv_heads, h).permute(0, 2, 3, 1, 4).reshape(d * kv_heads, -1, h)


def _put(out_DBNH: Tensor, rows: Tensor, k_DLKH: Tensor) -> None:
    """The inverse of `_rows`, written in place."""
    d, b, n, h = out_DBNH.shape
    kv_heads = k_DLKH.shape[2]
    shaped = rows.view(d, kv_heads, n // kv_heads, b, h).permute(0, 3, 1, 2, 4)
    out_DBNH.view(d, b, kv_heads, n // kv_heads, h).copy_(shaped)


def _probabilities(rows: Tensor, keys: Tensor, masks: tuple[Tensor, Tensor], block: int, window: int) -> Tensor:
    """Of a block of queries over the keys that one of them sees; the last key is the last query's own."""
    (later_QQ, older_QQ), n = masks, keys.shape[1]
    scores = torch.bmm(rows, keys.transpose(1, 2))
    by_query = scores.view(len(keys), -1, block, n)
    by_query[..., n - block :].add_(later_QQ[:block, :block])
    if (old := n - window) > 0:  # the last query does not see the first `old` keys, the one before it sees one of them
        by_query[..., block - old :, :old].add_(older_QQ[:old, :old])
    return torch.softmax(scores, -1)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a.T @ b"""
    if total.dtype == a.dtype:
        total.baddbmm_(a.transpose(1, 2), b)
    else:
        total.add_(torch.bmm(a.transpose(1, 2), b))
