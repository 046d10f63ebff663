"""Attention of sequences in generation, whose keys and values lie in pages, through torch's scaled_dot_product_attention.

Whole prompts that are read at once are documents like any, and their pages are only written. A sequence whose pages follow
each other is read where it lies; the pages of others are gathered first, which costs a copy of its keys and values. New
tokens of single sequences are decoded one sequence at a time where their pasts are long, for no value is then read
twice; many short ones are gathered, padded and masked in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm_core.contracts import KV, Batch, Paging
from nanovllm_kernels.torch_attention import documents

LONG = 96  # tokens of the mean past from which on a CPU decodes sequence by sequence


def paged_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, kv: KV, window: int | None = None
) -> Tensor:
    """As `contracts.Ops.paged_attention`, [T, N, H]."""
    paging = batch.paging
    assert paging is not None
    for pages, new in ((kv.k_PSKH, k_TKH), (kv.v_PSKH, v_TKH)):
        pages.flatten(0, 1).index_copy_(0, paging.places_T, new.to(pages.dtype))
    if not paging.exact:
        return _gathered(q_TNH, kv, paging, window)
    if paging.contexts == batch.lengths:
        return documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)
    ones = sum(1 for length in batch.lengths if length == 1)
    if ones == len(batch.lengths):
        return _decode(q_TNH, kv, paging, window)
    found, first = torch.empty_like(q_TNH), 0
    for d, length in enumerate(batch.lengths):
        rows = slice(first, first + length)
        if paging.contexts[d] == length:
            found[rows] = documents(q_TNH[rows], k_TKH[rows], v_TKH[rows], (length,), window)
        else:
            found[rows] = _sequence(q_TNH[rows], kv, paging, d, window)
        first += length
    return found


def _sequence(q_LNH: Tensor, kv: KV, paging: Paging, d: int, window: int | None) -> Tensor:
    """The last L tokens of sequence d over its pages."""
    new, heads, h = q_LNH.shape
    context = paging.contexts[d]
    first = 0 if window is None else max(0, context - new + 1 - window)
    k_SKH, v_SKH = (_past(pages, paging, d)[first:context] for pages in (kv.k_PSKH, kv.v_PSKH))
    kv_heads = k_SKH.shape[1]
    k_1KSH, v_1KSH = (x.to(q_LNH.dtype).transpose(0, 1)[None] for x in (k_SKH, v_SKH))
    if new == 1:  # the query heads of a key head stand as queries, so that nothing is repeated
        q_1KGH = q_LNH.view(1, kv_heads, heads // kv_heads, h)
        return scaled_dot_product_attention(q_1KGH, k_1KSH, v_1KSH).view(1, heads, h)
    at_L1 = torch.arange(context - new, context, device=q_LNH.device)[:, None]
    back_LS = at_L1 - torch.arange(first, context, device=q_LNH.device)
    seen_LS = back_LS >= 0 if window is None else (back_LS >= 0) & (back_LS < window)
    o_1NLH = scaled_dot_product_attention(
        q_LNH.transpose(0, 1)[None], k_1KSH, v_1KSH, attn_mask=seen_LS, enable_gqa=heads != kv_heads
    )
    return o_1NLH[0].transpose(0, 1)


def _past(pages_PSKH: Tensor, paging: Paging, d: int) -> Tensor:
    """The pages of sequence d end to end: a view where they follow each other."""
    size = pages_PSKH.shape[1]
    count = -(-paging.contexts[d] // size)
    first = paging.runs[d]
    found = pages_PSKH[first : first + count] if first >= 0 else pages_PSKH[paging.tables_DP[d, :count]]
    return found.flatten(0, 1)


def _decode(q_BNH: Tensor, kv: KV, paging: Paging, window: int | None) -> Tensor:
    """One token a sequence."""
    b = len(q_BNH)
    total, longest = sum(paging.contexts), max(paging.contexts)
    if b == 1 or (q_BNH.device.type == "cpu" and (total >= LONG * b or longest * b > 4 * total)):
        return torch.cat([_sequence(q_BNH[d : d + 1], kv, paging, d, window) for d in range(b)])
    return _gathered(q_BNH, kv, paging, window)


def _gathered(q_BNH: Tensor, kv: KV, paging: Paging, window: int | None) -> Tensor:
    """One token a sequence, of all at once; the host need not know how long they are."""
    b, n, h = q_BNH.shape
    size, kv_heads = kv.k_PSKH.shape[1:3]
    device = q_BNH.device
    tables_BP = paging.tables_DP[:, : -(-max(paging.contexts) // size)]
    back_BS = paging.contexts_D[:, None] - 1 - torch.arange(tables_BP.shape[1] * size, device=device)
    seen_BS = back_BS >= 0 if window is None else (back_BS >= 0) & (back_BS < window)
    k_BKSH, v_BKSH = (  # where nobody has written there may be anything, and no number times 0 is none
        pages[tables_BP].flatten(1, 2).to(q_BNH.dtype).masked_fill_(~seen_BS[:, :, None, None], 0).transpose(1, 2)
        for pages in (kv.k_PSKH, kv.v_PSKH)
    )
    q_BKGH = q_BNH.view(b, kv_heads, n // kv_heads, h)
    return scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=seen_BS[:, None, None]).reshape(b, n, h)
