"""Causal attention in bf16 of documents of one length on a CPU, in blocks of queries, from batched matmuls.

torch's own CPU kernel splits keys by 512, so up to that length it computes the half that the mask throws away, and it
gets less out of a CPU's bf16 instructions than a plain matmul does. Forward and backward of 8 documents of 512 tokens,
4 query heads of 64 over 2 key heads, on 2 cores: 26 ms instead of 50 (Zen 4), 24 instead of 35 (Sapphire Rapids). In
fp32 the gain is a tenth and goes with longer documents, so fp32 stays with torch's kernel.

Scores exist for one block of queries at a time and are made again in the backward. Query heads that share a key head
stand as further rows of one matmul, so keys and values are never repeated. What it costs: a score is rounded to bf16
before its softmax (which is fp32 inside), as eager attention in `transformers` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128  # of a block: half a block of scores, on average, is masked away
SCORES = 2**22  # scores that exist at once: documents are taken in portions


class CausalCpu(torch.autograd.Function):
    """(q_DLNH, k_DLKH, v_DLKH) -> o_DLNH, for D documents of L tokens each."""

    @staticmethod
    def forward(ctx: Any, q_DLNH: Tensor, k_DLKH: Tensor, v_DLKH: Tensor) -> Tensor:
        ctx.save_for_backward(q_DLNH, k_DLKH, v_DLKH)
        out_DLNH = torch.empty_like(q_DLNH, memory_format=torch.contiguous_format)
        for q, k, v, out in _portions(q_DLNH, k_DLKH, v_DLKH, out_DLNH):
            keys, values, mask = _scaled_keys(k), _by_head(v), _mask(q)
            for start, end in _blocks(q.shape[1]):
                probs = _probabilities(_rows(q[:, start:end], k), keys[:, :end], mask, start)
                _put(out[:, start:end], torch.bmm(probs, values[:, :end]), k)
        return out_DLNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DLNH: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for q, k, v, grad, d_q, d_k, d_v in _portions(*inputs, grad_DLNH, *grads):
            keys, values, mask = _scaled_keys(k), _by_head(v), _mask(q)
            # Sums over blocks of queries are kept in fp32, or fp64.
            sum_k, sum_v = (
                torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)
            )
            for start, end in _blocks(q.shape[1]):
                q_rows, grad_rows = _rows(q[:, start:end], k), _rows(grad[:, start:end], k)
                probs = _probabilities(q_rows, keys[:, :end], mask, start)
                _add(sum_v[:, :end], probs, grad_rows)
                d_probs = torch.bmm(grad_rows, values[:, :end].transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, -1, probs.dtype)
                _put(d_q[:, start:end], torch.bmm(d_scores, keys[:, :end]), k)
                _add(sum_k[:, :end], d_scores, q_rows)
            _put(d_k, sum_k.mul_(q.shape[3] ** -0.5), k)
            _put(d_v, sum_v, k)
        return grads


def _portions(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Some documents of every tensor at a time; the first is q."""
    documents, length, heads, _ = tensors[0].shape
    portion = max(1, SCORES // (length * heads * min(length, QUERIES)))
    for start in range(0, documents, portion):
        yield [x[start : start + portion] for x in tensors]


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, QUERIES):
        yield start, min(start + QUERIES, length)


def _by_head(x_DLKH: Tensor) -> Tensor:
    """[D * K, L, H]"""
    return x_DLKH.transpose(1, 2).flatten(0, 1).contiguous()


def _scaled_keys(k_DLKH: Tensor) -> Tensor:
    return _by_head(k_DLKH * k_DLKH.shape[3] ** -0.5)


def _mask(q_DLNH: Tensor) -> Tensor:
    """-inf above the diagonal of a block of queries."""
    size = min(QUERIES, q_DLNH.shape[1])
    return torch.full((size, size), -torch.inf, dtype=q_DLNH.dtype).triu_(1)


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


def _probabilities(rows: Tensor, keys: Tensor, mask_BB: Tensor, start: int) -> Tensor:
    scores = torch.bmm(rows, keys.transpose(1, 2))
    block = keys.shape[1] - start
    scores.view(len(keys), -1, block, keys.shape[1])[..., start:].add_(mask_BB[:block, :block])
    return torch.softmax(scores, -1)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a.T @ b"""
    if total.dtype == a.dtype:
        total.baddbmm_(a.transpose(1, 2), b)
    else:
        total.add_(torch.bmm(a.transpose(1, 2), b))
