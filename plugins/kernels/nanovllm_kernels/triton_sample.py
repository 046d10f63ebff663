"""Drawing the next tokens in Triton: logits are read once, and a stretch of them twice.

Each stretch of the vocabulary gives its largest logit and the sum of its weights beside that; a second kernel puts a row's
stretches together, chooses one by the first random number and reads it again for the second. Where rows have filters, what they
keep is found before (`triton_filters`). Nothing on the host depends on what the device holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.contracts import Draws
from nanovllm_kernels.torch_sampling import stretch_of
from nanovllm_kernels.triton_filters import limits


@triton.jit
def _kept(logits, token, inside, bound_ptr, last_ptr, row, FILTERS: tl.constexpr):
    """Which tokens of a row its filters keep."""
    if FILTERS:
        bound, last = tl.load(bound_ptr + row), tl.load(last_ptr + row)
        inside = inside & ((logits > bound) | ((logits == bound) & (token <= last)))
    return inside


@triton.jit(do_not_specialize=["stride"])
def _stretches(logits_ptr, heat_ptr, bound_ptr, last_ptr, sums_ptr, vocabulary, stride,
               EACH: tl.constexpr, BLOCK: tl.constexpr, STRETCHES: tl.constexpr, FILTERS: tl.constexpr):  # fmt: skip
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
    kept = _kept(logits, token, inside, bound_ptr, last_ptr, row, FILTERS)
    total = tl.sum(tl.where(kept, tl.exp((logits - safe) / heat), 0.0), 0)
    first = tl.min(tl.where(logits == largest, token, vocabulary), 0)
    to = sums_ptr + (row * STRETCHES + stretch) * 3
    tl.store(to, tl.where(damaged > 0, float("nan"), largest))
    tl.store(to + 1, total)
    tl.store(to + 2, first.to(tl.float32))  # exact below 2 ** 24


@triton.jit(do_not_specialize=["stride"])
def _draw(logits_ptr, heat_ptr, bound_ptr, last_ptr, u_ptr, sums_ptr, token_ptr, vocabulary, stride, u_stride,
          EACH: tl.constexpr, BLOCK: tl.constexpr, STRETCHES: tl.constexpr, LANES: tl.constexpr,
          FILTERS: tl.constexpr):  # fmt: skip
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
    kept = _kept(logits, token, inside, bound_ptr, last_ptr, row, FILTERS)
    within = tl.where(kept & finite, tl.exp((logits - top) / safe), 0.0).to(tl.float64)
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
    filters = draws.filtered_R is not None
    bound_B, last_B = limits(logits_BV, draws) if filters else (sums, sums)
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
        FILTERS=filters,
        num_warps=1,
    )
    u_B2 = draws.u_B2 if draws.u_B2.stride(1) == 1 else draws.u_B2.contiguous()
    _draw[(rows,)](
        logits_BV, draws.temperature_B, bound_B, last_B, u_B2, sums, tokens_B, vocabulary, logits_BV.stride(0),
        u_B2.stride(0), EACH=each, BLOCK=block, STRETCHES=stretches, LANES=triton.next_power_of_2(stretches),
        FILTERS=filters,
    )  # fmt: skip
    return tokens_B


sample.recordable = True  # type: ignore[attr-defined]  # what rows ask for it reads from the device
