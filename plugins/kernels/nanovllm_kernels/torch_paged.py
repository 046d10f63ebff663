"""Attention of sequences in generation, whose keys and values lie in pages, through torch's scaled_dot_product_attention.

Whole prompts that are read at once are documents like any, and their pages are only written. A sequence whose pages follow
each other is read where it lies; the pages of others are gathered first, which costs a copy of its keys and values. New
tokens of several sequences are gathered, padded and masked in one call, unless one of them is much longer than the others: a call
of torch's attention costs 60 us on a CPU, whatever it does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm_core.contracts import KV, Batch, Paging
from nanovllm_kernels.torch_attention import documents


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
    if b == 1 or (q_BNH.device.type == "cpu" and longest * b > 4 * total):
        return torch.cat([_sequence(q_BNH[d : d + 1], kv, paging, d, window) for d in range(b)])
    return _gathered(q_BNH, kv, paging, window)


def _gathered(q_BNH: Tensor, kv: KV, paging: Paging, window: int | None) -> Tensor:
    """One token a sequence, of all at once; the host need not know how long they are."""
    b, n, h = q_BNH.shape
    size, kv_heads = kv.k_PSKH.shape[1:3]
    seen_BS, own_BP, beyond_R = _shared(paging, size, window)
    if beyond_R is not None:
        k_BSKH, v_BSKH = (_own(pages, own_BP, beyond_R) for pages in (kv.k_PSKH, kv.v_PSKH))
    else:  # where nobody has written there may be anything, and no number times 0 is none
        k_BSKH, v_BSKH = (
            pages[own_BP].flatten(1, 2).masked_fill_(~seen_BS[:, :, None, None], 0) for pages in (kv.k_PSKH, kv.v_PSKH)
        )
    k_BKSH, v_BKSH = (x.to(q_BNH.dtype).transpose(1, 2) for x in (k_BSKH, v_BSKH))
    q_BKGH = q_BNH.view(b, kv_heads, n // kv_heads, h)
    return scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=seen_BS[:, None, None]).reshape(b, n, h)


@lru_cache(maxsize=2)  # a model has blocks with a window, and without
def _shared(paging: Paging, size: int, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What all blocks of a model need: which keys are seen; pages that are all of the sequence's own; on a CPU, of their places one
    behind the other, those beyond a sequence's end."""
    tables_BP, device = paging.tables_DP[:, : -(-max(paging.contexts) // size)], paging.tables_DP.device
    b, pages = tables_BP.shape
    page_P = torch.arange(pages, device=device)
    back_BS = paging.contexts_D[:, None] - 1 - torch.arange(pages * size, device=device)
    seen_BS = back_BS >= 0 if window is None else (back_BS >= 0) & (back_BS < window)
    last_B1 = (paging.contexts_D[:, None] - 1) // size
    own_BP = torch.where(page_P <= last_B1, tables_BP, tables_BP[:, :1])
    if device.type != "cpu":
        return seen_BS, own_BP, None
    beyond_BPS = (back_BS < 0).view(b, pages, size) & (page_P == last_B1)[:, :, None]
    return seen_BS, own_BP.long(), beyond_BPS.flatten().nonzero()[:, 0]


def _own(pages_PSKH: Tensor, own_BP: Tensor, beyond_R: Tensor) -> Tensor:
    """The pages of each sequence side by side, zeros beyond its end: what nobody has written may be no number."""
    found_PX = pages_PSKH.flatten(1).index_select(0, own_BP.flatten())
    found_PX.view(-1, pages_PSKH[0, 0].numel()).index_fill_(0, beyond_R, 0)
    return found_PX.view(len(own_BP), -1, *pages_PSKH.shape[2:])
