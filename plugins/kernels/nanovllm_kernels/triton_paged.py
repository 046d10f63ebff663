"""Attention of sequences in generation over their pages, in Triton: each key and value is read once a token that is drawn.

A tile is some new tokens of a sequence with all query heads of one key head, so that a key read serves them all; the softmax
goes along with the keys (Milakov & Gimelshein, 2018; Dao et al., 2022). A single new token has few rows, so its past is
split among programs (flash decoding: Dao et al., 2023), of which the one that is done last joins what all have found. Nothing on
the host depends on what the device holds but the longest context, which settles the number of parts.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_core.contracts import KV, Batch
from nanovllm_kernels.torch_attention import documents
from nanovllm_kernels.triton_launch import LINE, ON_CPU, fetch, launch_early, processors, rows_of

ROWS = 16  # fewest of a tile: what tensor cores take
TOKENS = 64  # rows of a tile of a prompt
ONE = MappingProxyType(
    {"KEYS": 32, "num_warps": 2, "num_stages": 2}
)  # a step of single tokens: keys, and how they are read
SOME = MappingProxyType({"KEYS": 32, "num_warps": 4, "num_stages": 3})  # of prompts
WAVES = 4  # programs per processor that decoding aims at
FEWEST = 256  # keys that are worth a program
MOST_PARTS = 32
MANY = 16  # parts from which on one warp each is faster
FETCHED = 64  # keys of a program that are on their way before the kernel in front is done

# Of pages: how many programs of each sequence and key head are done; zeros between two calls.
_done: WeakIdKeyDictionary = WeakIdKeyDictionary()


@triton.jit(do_not_specialize=["k_stride", "v_stride"])
def _write(k_ptr, v_ptr, place_ptr, k_page_ptr, v_page_ptr, k_stride, v_stride,
           WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place = tl.load(place_ptr + token) * WIDTH + column
    inside = column < WIDTH
    k, v = tl.load(k_ptr + token * k_stride + column, inside), tl.load(v_ptr + token * v_stride + column, inside)
    tl.store(k_page_ptr + place, k.to(k_page_ptr.dtype.element_ty), inside)
    tl.store(v_page_ptr + place, v.to(v_page_ptr.dtype.element_ty), inside)


@triton.jit
def _share(context, length, tile, part, window,
           TOKENS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr, NEW: tl.constexpr):  # fmt: skip
    """The first of the keys that a program reads, and the one after the last."""
    end = tl.minimum(context, context - length + (tile + 1) * TOKENS)
    low = 0
    if WINDOW:
        low = tl.maximum(0, context - length + tile * TOKENS + 1 - window) // KEYS * KEYS
    if NEW:
        end = context - 1
    share = tl.cdiv(tl.cdiv(end - low, PARTS), KEYS) * KEYS
    low = low + part * share
    return low, tl.minimum(end, low + share)


@triton.jit
def _join(part_ptr, sums_ptr, to_ptr, row, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """What all parts have found for a query head."""
    column = tl.arange(0, BLOCK)
    part = row.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    largest, total = tl.load(sums_ptr + part * 2), tl.load(sums_ptr + part * 2 + 1)
    weight = tl.exp2(largest - tl.max(largest, 0))
    found = tl.load(part_ptr + part[:, None] * SIZE + column[None, :], (column < SIZE)[None, :], 0.0)
    out = tl.sum(found * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(to_ptr + column, out.to(to_ptr.dtype.element_ty), column < SIZE)


@triton.jit(do_not_specialize=["first", "table_stride", "window"])
def _attend(q_ptr, k_ptr, v_ptr, place_ptr, k_page_ptr, v_page_ptr, table_ptr, context_ptr, start_ptr, out_ptr, part_ptr,
            sums_ptr, done_ptr, first, q_stride, k_stride, v_stride, table_stride, scale, window,
            HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
            TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
            PRECISION: tl.constexpr, WIDE: tl.constexpr, NEW: tl.constexpr, EARLY: tl.constexpr, FETCHED: tl.constexpr,
            LINES: tl.constexpr, LINE: tl.constexpr):  # fmt: skip
    kv_head, document = tl.program_id(0), first + tl.program_id(1)  # long documents first: the short ones fill the gaps
    tile, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    # What tells of the batch was there before any kernel that comes early.
    start = tl.load(start_ptr + document)
    length = tl.load(start_ptr + document + 1) - start
    context = tl.load(context_ptr + document)
    low, end = _share(context, length, tile, part, window, TOKENS, KEYS, PARTS, WINDOW, NEW)
    if EARLY:
        gdc_launch_dependents()
        if NEW:
            soon = tl.minimum(low + tl.arange(0, FETCHED), tl.maximum(end - 1, 0))
            holds = tl.load(table_ptr + document * table_stride + soon // PAGE).to(tl.int64)
            line = tl.minimum(tl.arange(0, LINES) * LINE, SIZE - 1)
            where = (((holds * PAGE + soon % PAGE) * HEADS + kv_head) * SIZE)[:, None] + line[None, :]
            fetch(k_page_ptr + where)
            fetch(v_page_ptr + where)
        gdc_wait()
    if tile * TOKENS < length:
        row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
        token = tile * TOKENS + row // GROUP
        known = (token < length) & (row < TOKENS * GROUP)
        at = context - length + token  # the position of each row's token
        head = kv_head * GROUP + row % GROUP
        q_place = (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * SIZE + column[None, :]
        q = tl.load(q_ptr + q_place, known[:, None] & (column < SIZE)[None, :], 0.0)
        if WIDE:
            q = q.to(tl.float32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS, BLOCK], tl.float32)
        if NEW:  # noqa: SIM102 (one is known when the kernel is compiled)
            if part == PARTS - 1:
                # The newest key and value: from where they were made, and to their page.
                new = kv_head * SIZE + column
                k_new = tl.load(k_ptr + start.to(tl.int64) * k_stride + new, column < SIZE, 0.0)
                v_new = tl.load(v_ptr + start.to(tl.int64) * v_stride + new, column < SIZE, 0.0)
                to = tl.load(place_ptr + start) * (HEADS * SIZE) + new
                tl.store(k_page_ptr + to, k_new.to(k_page_ptr.dtype.element_ty), column < SIZE)
                tl.store(v_page_ptr + to, v_new.to(v_page_ptr.dtype.element_ty), column < SIZE)
                largest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
                total = tl.full([ROWS], 1.0, tl.float32)
                found += v_new.to(tl.float32)[None, :]
        for key in range(low, end, KEYS):
            position = key + tl.arange(0, KEYS)
            there = position < end
            page = tl.load(table_ptr + document * table_stride + position // PAGE, there, 0).to(tl.int64)
            place = (page * PAGE + position % PAGE) * (HEADS * SIZE) + kv_head * SIZE
            inside = there[:, None] & (column < SIZE)[None, :]
            k = tl.load(k_page_ptr + place[:, None] + column[None, :], inside, 0.0)
            v = tl.load(v_page_ptr + place[:, None] + column[None, :], inside, 0.0)
            if WIDE:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            seen = there[None, :] & (position[None, :] <= at[:, None])
            if WINDOW:
                seen = seen & (position[None, :] > at[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(largest - safe)
            total = total * fade + tl.sum(weights, 1)
            found = found * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            largest = now
        if PARTS == 1:
            found = found / tl.where(known, total, 1.0)[:, None]
            o_place = ((start + token).to(tl.int64) * (HEADS * GROUP) + head)[:, None] * SIZE + column[None, :]
            tl.store(out_ptr + o_place, found.to(out_ptr.dtype.element_ty), known[:, None] & (column < SIZE)[None, :])
        else:  # one token a document
            to = (tl.program_id(1).to(tl.int64) * (HEADS * GROUP) + head) * PARTS + part
            tl.store(part_ptr + to[:, None] * SIZE + column[None, :], found, known[:, None] & (column < SIZE)[None, :])
            tl.store(sums_ptr + to * 2, largest, known)
            tl.store(sums_ptr + to * 2 + 1, total, known)
            tl.debug_barrier()  # all threads have stored
            counter = done_ptr + tl.program_id(1) * HEADS + kv_head
            if tl.atomic_add(counter, 1) == PARTS - 1:
                tl.store(counter, 0)
                for member in tl.static_range(GROUP):
                    of = kv_head * GROUP + member
                    of_out = out_ptr + (start.to(tl.int64) * (HEADS * GROUP) + of) * SIZE
                    _join(part_ptr, sums_ptr, of_out, tl.program_id(1) * (HEADS * GROUP) + of, SIZE, BLOCK, PARTS)


def paged_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, kv: KV, window: int | None = None
) -> Tensor:
    """As `contracts.Ops.paged_attention`, [T, N, H]. Single new tokens come before the parts of prompts."""
    paging = batch.paging
    assert paging is not None
    k_TC, v_TC = (rows_of(x.flatten(1)) for x in (k_TKH, v_TKH))
    whole = paging.exact and paging.contexts == batch.lengths  # prompts from their beginning
    ones = next((d for d, length in enumerate(batch.lengths) if length != 1), len(batch.lengths))
    first, width = 0 if whole else ones, k_TC.shape[1]
    if first < len(k_TC):
        _write[(len(k_TC) - first,)](
            k_TC[first:], v_TC[first:], paging.places_T[first:], kv.k_PSKH, kv.v_PSKH, k_TC.stride(0), v_TC.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
    if whole:
        return documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)
    out = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    q_TNH = q_TNH if q_TNH[0].is_contiguous() else q_TNH.contiguous()
    if ones:
        _run(q_TNH, k_TC, v_TC, batch, kv, out, window, 0, ones, 1)
    if ones < len(batch.lengths):
        _run(q_TNH, k_TC, v_TC, batch, kv, out, window, ones, len(batch.lengths), max(batch.lengths[ones:]))
    return out


paged_attention.recordable = True  # type: ignore[attr-defined]


def _run(
    q_TNH: Tensor, k_TC: Tensor, v_TC: Tensor, batch: Batch, kv: KV, out_TNH: Tensor, window: int | None, first: int, last: int,
    longest: int,
) -> None:  # fmt: skip
    """Documents first to last - 1, of at most `longest` new tokens each; the keys and values of single ones are written too."""
    paging = batch.paging
    assert paging is not None
    _, n, size = q_TNH.shape
    _, page, heads, _ = kv.k_PSKH.shape
    group, documents_here = n // heads, last - first
    tokens = 1 if longest == 1 else max(1, TOKENS // group)
    parts = _parts(documents_here * heads, max(paging.contexts[first:last]), q_TNH.device) if longest == 1 else 1
    several = parts > 1
    part = torch.empty((documents_here * n, parts, size) if several else 1, dtype=torch.float32, device=q_TNH.device)
    sums = torch.empty((documents_here * n, parts, 2) if several else 1, dtype=torch.float32, device=q_TNH.device)
    done = _counters(kv.k_PSKH, documents_here * heads) if several else sums
    block, line = max(16, triton.next_power_of_2(size)), LINE // kv.k_PSKH.element_size()
    _attend[(heads, documents_here, triton.cdiv(longest, tokens) * parts)](
        q_TNH, k_TC, v_TC, paging.places_T, kv.k_PSKH, kv.v_PSKH, paging.tables_DP, paging.contexts_D, batch.cu_seqlens,
        out_TNH, part, sums, done, first, q_TNH.stride(0), k_TC.stride(0), v_TC.stride(0), paging.tables_DP.stride(0),
        size**-0.5 * 1.4426950408889634, window or 0,
        HEADS=heads, GROUP=group, SIZE=size, BLOCK=block, PAGE=page, TOKENS=tokens,
        ROWS=max(ROWS, triton.next_power_of_2(tokens * group)), PARTS=parts, WINDOW=window is not None,
        PRECISION="ieee" if q_TNH.dtype == torch.float32 else "tf32",
        WIDE=q_TNH.device.type == "cpu",  # the interpreter's products know no bf16
        NEW=longest == 1, FETCHED=FETCHED, LINES=max(1, block // line), LINE=line,
        **launch_early(q_TNH.device), **(SOME if longest > 1 else ONE if parts < MANY else {**ONE, "num_warps": 1}),
    )  # fmt: skip


def _counters(pages: Tensor, count: int) -> Tensor:
    """At least so many zeros for those who share the work of a call on these pages. Recorded calls go on using the ones that they
    were recorded with."""
    kept: list[Tensor] = _done.setdefault(pages, [])
    if not kept or len(kept[-1]) < count:
        kept.append(torch.zeros(triton.next_power_of_2(count), dtype=torch.int32, device=pages.device))
    return kept[-1]


def _parts(tiles: int, longest: int, device: torch.device) -> int:
    """Into how many parts the past of single tokens is split: a power of two, as each is compiled for."""
    wanted = WAVES * processors(device) if device.type == "cuda" else ON_CPU * 4
    most = min(MOST_PARTS, triton.cdiv(longest, FEWEST if device.type == "cuda" else ONE["KEYS"]))
    parts = 1
    while 2 * parts <= most and parts * tiles < wanted:
        parts *= 2
    return parts
