"""What top-k, top-p and min-p keep of a row: the logits above a bound, and those at it up to a last token.

Most rows are known from their likeliest tokens (`triton_likeliest`). Of the others the bound is found digit by digit, four bits of
an order-preserving whole number at a time (a radix select: Alabi et al., "Fast k-selection algorithms for graphics
processing units", 2012): chunks of a row count in parallel what is at each of 16 candidates or above, and the next launch
adds them up and goes on; for top-p they add weights in place of counts. Nothing is sorted, sums are made in one order, and the
rows that are known are left at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.contracts import Draws
from nanovllm_kernels.triton_likeliest import CHUNK, key_of, likeliest, logit_of, narrowed, raised, top_of

BLOCK = 1024  # tokens of a chunk at once
DIGITS = 8  # of a key
COUNTS, WEIGHTS = 0, 1
NEVER = 0x7FFFFF  # the key of -inf: none is less


@triton.jit
def _all(partial_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The sum of a row's chunks, one number each."""
    lane = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(partial_ptr + row * chunks + lane, lane < chunks, 0.0), 0)


@triton.jit
def _chosen(found_ptr, state_ptr, row, chunks, wanted, DIGIT: tl.constexpr, LEAST: tl.constexpr, CHUNKS: tl.constexpr,
            LAST: tl.constexpr):  # fmt: skip
    """Key and what is above it, once the first DIGIT digits are known: from what the launch before has found.

    A key ends after LAST digits as that of -inf does, where logits are negative; else in zeros.
    """
    key, above = tl.full([], LEAST, tl.float64), tl.zeros([], tl.float64)
    if DIGIT > 0:
        key, above = tl.load(state_ptr + row * 2), tl.load(state_ptr + row * 2 + 1)
        chunk, lane = tl.arange(0, CHUNKS), tl.arange(0, 16)
        at = (row * chunks + chunk)[:, None] * 16 + lane[None, :]
        found = tl.sum(tl.load(found_ptr + at, (chunk < chunks)[:, None], 0.0), 0)
        digit = tl.maximum(tl.sum((found >= wanted).to(tl.int32), 0) - 1, 0)
        above = tl.where(digit < 15, tl.sum(tl.where(lane == digit + 1, found, 0.0), 0), above)
        key += digit.to(tl.float64) * (1 << (4 * (8 - DIGIT)))
        if (DIGIT == LAST) & (LAST < 8):
            key = tl.where(key >= 0x7FFFFFFF, key + 1, key)
    return key, above


@triton.jit
def _wanted(k, p, kept_ptr, mass_ptr, tops_ptr, row, chunks, heat, KIND: tl.constexpr, CHUNKS: tl.constexpr):
    """How many tokens, or how much weight, are kept."""
    wanted = k.to(tl.float64)
    if KIND == 1:
        key, ties = tl.load(kept_ptr + row * 2), tl.load(kept_ptr + row * 2 + 1)
        own = tl.exp((logit_of(key) - top_of(tops_ptr, row, chunks, CHUNKS)) / heat).to(tl.float64)
        wanted = p * (_all(mass_ptr, row, chunks, CHUNKS) + tl.where(ties > 0, ties * own, 0.0))
    return wanted


@triton.jit(do_not_specialize=["stride"])
def _digit(logits_ptr, heat_ptr, k_ptr, p_ptr, left_ptr, kept_ptr, mass_ptr, tops_ptr, before_ptr, found_ptr, was_ptr, state_ptr,
           vocabulary, stride, DIGIT: tl.constexpr, KIND: tl.constexpr, LEAST: tl.constexpr, CHUNK: tl.constexpr,
           BLOCK: tl.constexpr, CHUNKS: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Of a chunk, how much is at each candidate for the next digit, or above it."""
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    heat, k, p = tl.load(heat_ptr + row), tl.load(k_ptr + row), tl.load(p_ptr + row)
    asked = (k < vocabulary) if KIND == 0 else (p < 1)
    if asked & (tl.load(left_ptr + row) > 0):
        heat = tl.maximum(heat, 1.1754943508222875e-38)
        wanted = _wanted(k, p, kept_ptr, mass_ptr, tops_ptr, row, chunks, heat, KIND, CHUNKS)
        key, above = _chosen(before_ptr, was_ptr, row, chunks, wanted, DIGIT, LEAST, CHUNKS, LAST)
        if chunk == 0:
            tl.store(state_ptr + row * 2, key)
            tl.store(state_ptr + row * 2 + 1, above)
        top = top_of(tops_ptr, row, chunks, CHUNKS)
        lane = tl.arange(0, 16)
        least = tl.minimum(key.to(tl.int64) + (lane.to(tl.int64) << (4 * (7 - DIGIT))), 0xFFFFFFFF).to(tl.uint32)
        found = tl.zeros([16], tl.float64)
        for first in range(chunk * CHUNK, tl.minimum(vocabulary, (chunk + 1) * CHUNK), BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < vocabulary
            logits = tl.load(logits_ptr + row * stride + token, inside, float("-inf")).to(tl.float32)
            share = tl.where(inside, 1.0, 0.0)
            if KIND == 1:
                share = tl.where(inside, tl.exp((logits - top) / heat), 0.0)
            met = key_of(logits)[:, None] >= least[None, :]
            found += tl.sum(tl.where(met, share[:, None], 0.0), 0).to(tl.float64)
        tl.store(found_ptr + (row * chunks + chunk) * 16 + lane, found)


@triton.jit(do_not_specialize=["stride"])
def _mass(logits_ptr, heat_ptr, k_ptr, _p_ptr, left_ptr, kept_ptr, mass_ptr, tops_ptr, before_ptr, was_ptr, vocabulary, stride,
          LEAST: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
          LAST: tl.constexpr):  # fmt: skip
    """What top-k keeps: its key, how many at it; and of a chunk, the weight above it."""
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    heat, k = tl.load(heat_ptr + row), tl.load(k_ptr + row)
    if tl.load(left_ptr + row) > 0:
        key, ties = tl.full([], LEAST, tl.float64) - 1, tl.zeros([], tl.float64)  # all are above it
        if k < vocabulary:
            key, above = _chosen(before_ptr, was_ptr, row, chunks, k.to(tl.float64), LAST, LEAST, CHUNKS, LAST)
            ties = k.to(tl.float64) - above
        if chunk == 0:
            tl.store(kept_ptr + row * 2, key)
            tl.store(kept_ptr + row * 2 + 1, ties)
        heat, top = tl.maximum(heat, 1.1754943508222875e-38), top_of(tops_ptr, row, chunks, CHUNKS)
        mass = tl.zeros([], tl.float64)
        for first in range(chunk * CHUNK, tl.minimum(vocabulary, (chunk + 1) * CHUNK), BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < vocabulary
            logits = tl.load(logits_ptr + row * stride + token, inside, float("-inf")).to(tl.float32)
            above_it = inside & (key_of(logits).to(tl.int64) > key.to(tl.int64))
            mass += tl.sum(tl.where(above_it, tl.exp((logits - top) / heat), 0.0), 0).to(tl.float64)
        tl.store(mass_ptr + row * chunks + chunk, mass)


@triton.jit(do_not_specialize=["stride"])
def _bound(logits_ptr, heat_ptr, k_ptr, p_ptr, left_ptr, share_ptr, kept_ptr, mass_ptr, tops_ptr, before_ptr, was_ptr,
           bound_ptr, last_ptr, vocabulary, stride, chunks, LEAST: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
           LAST: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat, k, p, share = tl.load(heat_ptr + row), tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(share_ptr + row)
    if tl.load(left_ptr + row) > 0:
        heat, top = tl.maximum(heat, 1.1754943508222875e-38), top_of(tops_ptr, row, chunks, CHUNKS)
        key, ties = tl.load(kept_ptr + row * 2), tl.load(kept_ptr + row * 2 + 1)
        if p < 1:
            wanted = _wanted(k, p, kept_ptr, mass_ptr, tops_ptr, row, chunks, heat, 1, CHUNKS)
            likely, above = _chosen(before_ptr, was_ptr, row, chunks, wanted, LAST, LEAST, CHUNKS, LAST)
            own = tl.exp((logit_of(likely) - top) / heat).to(tl.float64)
            key, ties = narrowed(key, ties, likely, above, wanted, own)
        bound = logit_of(key)
        before, last = tl.zeros([], tl.int32), tl.full([], -1, tl.int32)
        for first in range(0, vocabulary, BLOCK):
            token = first + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * stride + token, token < vocabulary, float("nan")).to(tl.float32)
            same = (logits == bound).to(tl.int32)
            kept = (same > 0) & (before + tl.cumsum(same, 0) <= ties)
            last = tl.maximum(last, tl.max(tl.where(kept, token, -1), 0))
            before += tl.sum(same, 0)
        bound, last = raised(bound, last, top, heat, share, vocabulary)
        tl.store(bound_ptr + row, bound)
        tl.store(last_ptr + row, last)


def limits(logits_BV: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The bound [B] fp32 and the last token at it [B] int32; of a row without filters -inf and V."""
    (rows, vocabulary), device, stride = logits_BV.shape, logits_BV.device, logits_BV.stride(0)
    chunks = triton.cdiv(vocabulary, CHUNK)
    digits = DIGITS // 2 if logits_BV.dtype == torch.bfloat16 else DIGITS
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK, "CHUNKS": triton.next_power_of_2(chunks), "LEAST": NEVER, "LAST": digits}
    heat_B, k_B, p_B, share_B = (
        x.contiguous() for x in (draws.temperature_B, draws.top_k_B, draws.top_p_B, draws.min_p_B)
    )
    found = [torch.empty(rows, chunks, 16, dtype=torch.float64, device=device) for _ in range(2)]
    state = [torch.empty(rows, 2, dtype=torch.float64, device=device) for _ in range(2)]
    mass_BC, kept_B2 = torch.empty(rows, chunks, dtype=torch.float64, device=device), torch.empty_like(state[0])
    bound_B, last_B, left_B, tops_BC = likeliest(logits_BV, heat_B, k_B, p_B, share_B, 4 * digits)
    grid, asked = (chunks, rows), (logits_BV, heat_B, k_B, p_B, left_B)
    for kind in (COUNTS, WEIGHTS):
        for digit in range(digits):
            was, now = digit % 2, 1 - digit % 2
            _digit[grid](
                *asked, kept_B2, mass_BC, tops_BC, found[was], found[now], state[was], state[now], vocabulary, stride,
                DIGIT=digit, KIND=kind, num_warps=8, **sizes,
            )  # fmt: skip
        if kind == COUNTS:
            _mass[grid](*asked, kept_B2, mass_BC, tops_BC, found[0], state[0], vocabulary, stride, **sizes)
    _bound[(rows,)](
        *asked, share_B, kept_B2, mass_BC, tops_BC, found[0], state[0], bound_B, last_B, vocabulary, stride, chunks,
        num_warps=8, **(sizes | {"BLOCK": CHUNK}),
    )  # fmt: skip
    return bound_B, last_B
