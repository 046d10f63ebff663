"""Drawing the next tokens in Triton: logits are read once, and a stretch of them twice.

Each stretch of the vocabulary gives its largest logit and the sum of its weights beside that; a second kernel puts a row's
stretches together, chooses one by the first random number and reads it again for the second. Before them, what the filters of a row
keep is found as its least logit, digit by digit (a radix select, for top-p over weights in place of counts), so nothing is sorted.
Nothing on the host depends on what the device holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.contracts import Draws
from nanovllm_kernels.torch_sampling import stretch_of

SEARCHED = 2048  # tokens of a row at once where the bound of what filters keep is looked for


@triton.jit
def _key(logits):
    """uint32 in the order of the logits."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _search(row_ptr, vocabulary, top, heat, wanted, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key with at least `wanted` tokens (or weight) at and above it, and how much is above it."""
    lane = tl.arange(0, 16).to(tl.int64)
    key, above = tl.zeros([], tl.int64), tl.zeros([], tl.float64)
    for digit in range(8):
        shift = 28 - 4 * digit
        least = (key + (lane << shift)).to(tl.uint32)
        found = tl.zeros([16], tl.float64)
        for first in range(0, vocabulary, BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < vocabulary
            logits = tl.load(row_ptr + token, inside, float("-inf")).to(tl.float32)
            share = tl.where(inside, 1.0, 0.0)
            if WEIGHTS:
                share = tl.where(inside, tl.exp((logits - top) / heat), 0.0)
            met = _key(logits)[:, None] >= least[None, :]
            found += tl.sum(tl.where(met, share[:, None], 0.0), 0).to(tl.float64)
        chosen = tl.maximum(tl.sum((found >= wanted).to(tl.int32), 0) - 1, 0).to(tl.int64)
        next_ = tl.sum(tl.where(lane == chosen + 1, found, 0.0), 0)
        above = tl.where(chosen < 15, next_, above)
        key += chosen << shift
    return key, above


@triton.jit(do_not_specialize=["stride"])
def _limits(
    logits_ptr, heat_ptr, k_ptr, p_ptr, share_ptr, bound_ptr, last_ptr, vocabulary, stride, BLOCK: tl.constexpr
):
    """What a row keeps: logits above a bound, and those at it up to a last token."""
    row = tl.program_id(0).to(tl.int64)
    heat, k = tl.load(heat_ptr + row), tl.load(k_ptr + row)
    p, share = tl.load(p_ptr + row), tl.load(share_ptr + row)
    bound, last = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32) + vocabulary
    if (heat > 0) & ((k < vocabulary) | (p < 1) | (share > 0)):
        row_ptr = logits_ptr + row * stride
        safe = tl.maximum(heat, 1.1754943508222875e-38)
        tops = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            token = first + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(row_ptr + token, token < vocabulary, float("-inf")).to(tl.float32))
        top = tl.max(tops, 0)
        if (k < vocabulary) | (p < 1):
            key, ties = (
                tl.zeros([], tl.int64),
                tl.full([], 0, tl.float64) + vocabulary,
            )  # at the bound, as many as are kept
            if k < vocabulary:
                key, above = _search(row_ptr, vocabulary, top, safe, k.to(tl.float64), False, BLOCK)
                ties = k.to(tl.float64) - above
            if p < 1:
                total = tl.zeros([], tl.float64)
                met = tl.zeros([], tl.float64)
                for first in range(0, vocabulary, BLOCK):
                    token = first + tl.arange(0, BLOCK)
                    inside = token < vocabulary
                    logits = tl.load(row_ptr + token, inside, float("-inf")).to(tl.float32)
                    weight = tl.where(inside, tl.exp((logits - top) / safe), 0.0)
                    keys = _key(logits).to(tl.int64)
                    total += tl.sum(tl.where(keys > key, weight, 0.0), 0).to(tl.float64)
                    met = tl.maximum(met, tl.max(tl.where(keys == key, weight, 0.0), 0).to(tl.float64))
                if k < vocabulary:
                    total += ties * met
                wanted = p * total
                likely, above = _search(row_ptr, vocabulary, top, safe, wanted, True, BLOCK)
                own = tl.exp((_logit(likely) - top) / safe).to(tl.float64)
                some = tl.maximum(tl.ceil((wanted - above) / tl.maximum(own, 1e-300)), 1.0)
                ties = tl.where(likely > key, some, tl.minimum(ties, some))
                key = tl.maximum(key, likely)
            bound = _logit(key)
            before, last = tl.zeros([], tl.int32), tl.full([], -1, tl.int32)
            for first in range(0, vocabulary, BLOCK):
                token = first + tl.arange(0, BLOCK)
                logits = tl.load(row_ptr + token, token < vocabulary, float("nan")).to(tl.float32)
                same = (logits == bound).to(tl.int32)
                kept = (same > 0) & (before + tl.cumsum(same, 0) <= ties)
                last = tl.maximum(last, tl.max(tl.where(kept, token, -1), 0))
                before += tl.sum(same, 0)
        least = top + safe * tl.log(share)
        if (share > 0) & (least > bound):
            bound, last = least, last * 0 + vocabulary
    tl.store(bound_ptr + row, bound)
    tl.store(last_ptr + row, last)


@triton.jit
def _logit(key):
    """Of a key."""
    low = key.to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.where(low < 0, low ^ -2147483648, ~low).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride"])
def _stretches(logits_ptr, heat_ptr, bound_ptr, last_ptr, sums_ptr, vocabulary, stride,
               EACH: tl.constexpr, BLOCK: tl.constexpr, STRETCHES: tl.constexpr):  # fmt: skip
    """Of each stretch: its largest logit, the sum beside it of the weights that are kept, and the first token that has it."""
    stretch, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    token = stretch * EACH + place
    inside = (place < EACH) & (token < vocabulary)
    logits = tl.load(logits_ptr + row * stride + token, inside, float("-inf")).to(tl.float32)
    damaged = tl.max((logits != logits).to(tl.int32), 0)
    largest = tl.max(logits, 0)
    safe = tl.where(largest > float("-inf"), largest, 0.0)
    heat = tl.maximum(tl.load(heat_ptr + row), 1.1754943508222875e-38)
    bound, last = tl.load(bound_ptr + row), tl.load(last_ptr + row)
    kept = inside & ((logits > bound) | ((logits == bound) & (token <= last)))
    total = tl.sum(tl.where(kept, tl.exp((logits - safe) / heat), 0.0), 0)
    first = tl.min(tl.where(logits == largest, token, vocabulary), 0)
    to = sums_ptr + (row * STRETCHES + stretch) * 3
    tl.store(to, tl.where(damaged > 0, float("nan"), largest))
    tl.store(to + 1, total)
    tl.store(to + 2, first.to(tl.float32))  # exact below 2 ** 24


@triton.jit(do_not_specialize=["stride"])
def _draw(logits_ptr, heat_ptr, bound_ptr, last_ptr, u_ptr, sums_ptr, token_ptr, vocabulary, stride, u_stride,
          EACH: tl.constexpr, BLOCK: tl.constexpr, STRETCHES: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    there = lane < STRETCHES
    at = sums_ptr + (row * STRETCHES + lane) * 3
    tops = tl.load(at, there, float("-inf"))
    sums = tl.load(at + 1, there, 0.0)
    firsts = tl.load(at + 2, there, 0.0).to(tl.int32)
    finite = tl.max(((tops != tops) | (tops == float("inf"))).to(tl.int32), 0) == 0
    top = tl.max(tl.where(tops == tops, tops, float("-inf")), 0)
    finite = finite & (top > float("-inf"))
    top = tl.where(finite, top, 0.0)
    heat = tl.load(heat_ptr + row)
    safe = tl.maximum(heat, 1.1754943508222875e-38)
    weights = tl.where(there & (tops > float("-inf")), sums * tl.exp((tops - top) / safe), 0.0).to(tl.float64)
    running = tl.cumsum(weights, 0)
    u = tl.load(u_ptr + row * u_stride)
    total = tl.max(running, 0)
    stretch = tl.min(tl.where(there & (running > u * total), lane, STRETCHES - 1), 0)
    place = tl.arange(0, BLOCK)
    token = stretch * EACH + place
    inside = (place < EACH) & (token < vocabulary)
    logits = tl.load(logits_ptr + row * stride + token, inside, float("-inf")).to(tl.float32)
    bound, last = tl.load(bound_ptr + row), tl.load(last_ptr + row)
    kept = (logits > bound) | ((logits == bound) & (token <= last))
    within = tl.where(inside & kept & finite, tl.exp((logits - top) / safe), 0.0).to(tl.float64)
    sums_within = tl.cumsum(within, 0)
    u = tl.load(u_ptr + row * u_stride + 1)
    chosen = tl.min(tl.where(inside & (sums_within > u * tl.max(sums_within, 0)), token, vocabulary - 1), 0)
    greedy = tl.min(tl.where(there & (tops == top), firsts, vocabulary - 1), 0)
    found = tl.where(heat > 0, chosen, greedy)
    tl.store(token_ptr + row, tl.where(finite, found, -1).to(tl.int64))


def sample(logits_BV: Tensor, draws: Draws) -> Tensor:
    """As `contracts.Ops.sample`, [B]."""
    rows, vocabulary = logits_BV.shape
    tokens_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    if not rows:
        return tokens_B
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    each = stretch_of(vocabulary)
    stretches, block = triton.cdiv(vocabulary, each), triton.next_power_of_2(each)
    sums = torch.empty(rows, stretches, 3, dtype=torch.float32, device=logits_BV.device)
    bound_B = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    last_B = torch.empty(rows, dtype=torch.int32, device=logits_BV.device)
    filters = (x.contiguous() for x in (draws.top_k_B, draws.top_p_B, draws.min_p_B))
    _limits[(rows,)](
        logits_BV, draws.temperature_B, *filters, bound_B, last_B, vocabulary, logits_BV.stride(0),
        BLOCK=min(SEARCHED, triton.next_power_of_2(vocabulary)), num_warps=16,
    )  # fmt: skip
    _stretches[(stretches, rows)](
        logits_BV,
        draws.temperature_B,
        bound_B,
        last_B,
        sums,
        vocabulary,
        logits_BV.stride(0),
        EACH=each,
        BLOCK=block,
        STRETCHES=stretches,
    )
    u_B2 = draws.u_B2 if draws.u_B2.stride(1) == 1 else draws.u_B2.contiguous()
    _draw[(rows,)](
        logits_BV, draws.temperature_B, bound_B, last_B, u_B2, sums, tokens_B, vocabulary, logits_BV.stride(0),
        u_B2.stride(0), EACH=each, BLOCK=block, STRETCHES=stretches, LANES=triton.next_power_of_2(stretches),
    )  # fmt: skip
    return tokens_B


sample.recordable = True  # type: ignore[attr-defined]
