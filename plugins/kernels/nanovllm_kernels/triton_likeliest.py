"""What top-k, top-p and min-p keep of a row, where that is among its likeliest tokens: nearly always.

A row's tokens are looked at once, in groups, of which the largest logits are kept. Some hundred groups then hold all
tokens above a bound; one program a row has these in its registers and halves the range of keys until it knows how far the row is
kept. Where they do not hold enough tokens, or not enough probability, the row is left for `triton_filters`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16  # tokens
MOST = 512  # groups that are looked at again
CHUNK = 4096  # tokens of a program
NOBODY = tl.constexpr(-(2**31))  # less than any number in the order of the logits


@triton.jit
def _ordered(logits):
    """int32 in the order of the logits."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _somebody(logits):
    """As `_ordered`; what is no number is the least, but for NOBODY."""
    return tl.where(logits == logits, _ordered(logits), NOBODY + 1)


@triton.jit
def _logit(ordered):
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def key_of(logits):
    """uint32 in the order of the logits."""
    return (_ordered(logits) ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def logit_of(key):
    return _logit(key.to(tl.int64).to(tl.uint32).to(tl.int32, bitcast=True) ^ -2147483648)


@triton.jit
def narrowed(key, ties, likely, above, wanted, own):
    """What top-k keeps, and of that what top-p does: the key, and how many at it. `likely` is top-p's key, `above` the weight
    above it and `own` that of one token at it."""
    some = tl.maximum(tl.ceil((wanted - above) / tl.maximum(own, 1e-300)), 1.0)
    ties = tl.where(likely > key, some, tl.where(likely == key, tl.minimum(ties, some), ties))
    return tl.maximum(key, likely), ties


@triton.jit
def raised(bound, last, top, heat, share, vocabulary):
    """With min-p: the bound, and the last token at it."""
    least = top + heat * tl.log(share)
    higher = (share > 0) & (least > bound)
    return tl.where(higher, least, bound), tl.where(higher, vocabulary, last)


@triton.jit
def _tried(key, bit):
    """A key of 32 bits, from zero up, with one more of its bits; and the number in the order of the logits."""
    key += tl.full([], 1, tl.int64) << (31 - bit)
    return key, (key - 0x80000000).to(tl.int32)


@triton.jit
def top_of(tops_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The largest logit of a row, from those of its chunks."""
    lane = tl.arange(0, CHUNKS)
    return tl.max(tl.load(tops_ptr + row * chunks + lane, lane < chunks, float("-inf")), 0)


@triton.jit(do_not_specialize=["stride"])
def _groups(logits_ptr, heat_ptr, tops_ptr, sums_ptr, groups_ptr, vocabulary, stride,
            CHUNK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Of a chunk: each group's largest logit, the largest of all, and the sum of the weights beside that."""
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    group = tl.arange(0, CHUNK // GROUP)
    token = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(logits_ptr + row * stride + token, token < vocabulary, float("-inf")).to(tl.float32)
    heat = tl.maximum(tl.load(heat_ptr + row), 1.1754943508222875e-38)
    tops = tl.max(logits, 1)
    top = tl.max(tops, 0)
    weights = tl.exp((logits - tl.where(top > float("-inf"), top, 0.0)) / heat)
    tl.store(groups_ptr + (row * chunks + chunk) * (CHUNK // GROUP) + group, tops)
    tl.store(tops_ptr + row * chunks + chunk, top)
    tl.store(sums_ptr + row * chunks + chunk, tl.sum(tl.sum(weights, 1).to(tl.float64), 0))


@triton.jit
def _least(keys, shares, wanted, BITS: tl.constexpr):
    """The largest key from which on the shares add up to what is wanted; it is one of the keys."""
    found, least = tl.zeros([], tl.int64), tl.full([], NOBODY, tl.int32)
    for bit in range(BITS):
        tried, key = _tried(found, bit)
        enough = tl.sum(tl.where(keys >= key, shares, 0.0).to(tl.float64)) >= wanted
        found, least = tl.where(enough, tried, found), tl.where(enough, key, least)
    return tl.min(tl.where(keys >= least, keys, 0x7FFFFFFF))


@triton.jit(do_not_specialize=["stride"])
def _select(logits_ptr, heat_ptr, k_ptr, p_ptr, share_ptr, tops_ptr, sums_ptr, groups_ptr, order_ptr, bound_ptr, last_ptr,
            left_ptr, vocabulary, stride, chunks, BITS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
            GROUP: tl.constexpr, MOST: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat, k, p, share = tl.load(heat_ptr + row), tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(share_ptr + row)
    bound, last = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32) + vocabulary
    left = tl.full([], 0, tl.int32)
    if heat > 0:
        heat, top = tl.maximum(heat, 1.1754943508222875e-38), top_of(tops_ptr, row, chunks, CHUNKS)
        if (k < vocabulary) | (p < 1):
            # The groups with the largest tops, as many as there is room for: all tokens from `low` on are in them.
            lane = tl.arange(0, LANES)
            there = lane * GROUP < vocabulary
            tops = tl.load(groups_ptr + row * chunks * EACH + lane, lane < chunks * EACH, float("-inf"))
            keys = tl.where(there, _somebody(tops), NOBODY)
            low = tl.full([], NOBODY, tl.int32)
            if tl.sum(there.to(tl.int32), 0) > MOST:
                found = tl.zeros([], tl.int64)
                for bit in range(BITS):
                    tried, tried_key = _tried(found, bit)
                    found = tl.where(tl.sum((keys >= tried_key).to(tl.int32), 0) > MOST, tried, found)
                found, low = _tried(found, BITS - 1)
            chosen = (keys >= low) & there
            count = tl.sum(chosen.to(tl.int32), 0)
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(order_ptr + row * MOST + place, lane, chosen & (place < MOST))
            tl.debug_barrier()  # what one thread has stored another loads
            slot = tl.arange(0, MOST)
            group = tl.load(order_ptr + row * MOST + slot, slot < count, 0)
            token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside = (slot < count)[:, None] & (token < vocabulary)
            logits = tl.load(logits_ptr + row * stride + token, inside, float("-inf")).to(tl.float32)
            near = tl.where(inside, _somebody(logits), NOBODY)
            near = tl.where(near >= low, near, NOBODY)
            weights = tl.where(near > NOBODY, tl.exp((logits - top) / heat), 0.0)
            key, ties = tl.full([], NOBODY, tl.int32), tl.zeros([], tl.float64)
            if k < vocabulary:
                ones = tl.where(near > NOBODY, 1.0, 0.0)
                left = (tl.sum(ones) < k).to(tl.int32)
                key = _least(near, ones, k.to(tl.float64), BITS)
                ties = k.to(tl.float64) - tl.sum(tl.where(near > key, ones, 0.0))
            if p < 1:
                chunk = tl.arange(0, CHUNKS)
                within = tl.load(sums_ptr + row * chunks + chunk, chunk < chunks, 0.0)
                beside = tl.load(tops_ptr + row * chunks + chunk, chunk < chunks, float("-inf"))
                mass = tl.sum(within * tl.exp((beside - top) / heat).to(tl.float64), 0)
                if k < vocabulary:
                    own = tl.exp((_logit(key) - top) / heat).to(tl.float64)
                    mass = tl.sum(tl.where(near > key, weights, 0.0).to(tl.float64)) + ties * own
                wanted = p * mass
                left = tl.maximum(left, (tl.sum(weights.to(tl.float64)) < wanted).to(tl.int32))
                likely = _least(near, weights, wanted, BITS)
                above = tl.sum(tl.where(near > likely, weights, 0.0).to(tl.float64))
                own = tl.exp((_logit(likely) - top) / heat).to(tl.float64)
                key, ties = narrowed(key, ties, likely, above, wanted, own)
            bound = _logit(key)
            same = ((near == key) & (near > NOBODY)).to(tl.int32)
            of_group = tl.sum(same, 1)
            before = (tl.cumsum(of_group, 0) - of_group)[:, None] + tl.cumsum(same, 1)
            last = tl.max(tl.where((same > 0) & (before <= ties), token, -1))
        bound, last = raised(bound, last, top, heat, share, vocabulary)
    tl.store(bound_ptr + row, bound)
    tl.store(last_ptr + row, last)
    tl.store(left_ptr + row, left)


def likeliest(
    logits_BV: Tensor, heat_B: Tensor, k_B: Tensor, p_B: Tensor, share_B: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bound [B] fp32 and the last token at it [B] int32 (of a row without filters -inf and V); 1 [B] int32 for a row of which
    they are not known, else 0; the largest logit of each chunk [B, chunks]. bits: of a key, from its highest, that may differ."""
    (rows, vocabulary), device, stride = logits_BV.shape, logits_BV.device, logits_BV.stride(0)
    chunks, each = triton.cdiv(vocabulary, CHUNK), CHUNK // GROUP
    tops_BC = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    sums_BC = torch.empty(rows, chunks, dtype=torch.float64, device=device)
    groups_BG = torch.empty(rows, chunks * each, dtype=torch.float32, device=device)
    order_BM = torch.empty(rows, MOST, dtype=torch.int32, device=device)
    bound_B, (last_B, left_B) = torch.empty_like(heat_B), torch.empty(2, rows, dtype=torch.int32, device=device)
    _groups[(chunks, rows)](
        logits_BV, heat_B, tops_BC, sums_BC, groups_BG, vocabulary, stride, CHUNK=CHUNK, GROUP=GROUP,
    )  # fmt: skip
    _select[(rows,)](
        logits_BV, heat_B, k_B, p_B, share_B, tops_BC, sums_BC, groups_BG, order_BM, bound_B, last_B, left_B, vocabulary, stride,
        chunks, BITS=bits, CHUNKS=triton.next_power_of_2(chunks), LANES=triton.next_power_of_2(chunks * each), GROUP=GROUP,
        MOST=MOST, EACH=each, num_warps=16,
    )  # fmt: skip
    return bound_B, last_B, left_B, tops_BC
