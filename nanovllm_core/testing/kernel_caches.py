"""Pages for kernels under test (`contracts.KV`), with poison wherever nothing is to be read."""

from __future__ import annotations

import itertools

import torch
from attrs import evolve, frozen

from nanovllm_core.contracts import KV, KernelRequest
from nanovllm_core.inference.paged import paged_batch
from nanovllm_core.testing.kernel_calls import Call, calls

UNWRITTEN = (
    3e4  # within a sequence's pages, beyond its tokens: an engine's memory is finite there, and may hold anything
)


@frozen
class Case:
    """Sequences in generation: tokens that each has in its pages, and new ones."""

    past: tuple[int, ...]
    new: tuple[int, ...]
    page: int  # tokens
    scattered: bool  # pages of a sequence do not follow each other

    def __str__(self) -> str:
        return f"new tokens {self.new} after {self.past}, pages of {self.page}" + (", scattered" * self.scattered)


CASES = (
    Case((0, 3, 40, 17), (1, 1, 1, 1), 8, scattered=True),
    Case((0, 3, 40, 17), (1, 1, 1, 1), 8, scattered=False),
    Case((7,), (1,), 16, scattered=False),
    Case((200, 130, 300), (1, 1, 1), 16, scattered=True),
    Case((12, 5, 0, 16, 0, 33), (1, 1, 1, 5, 9, 20), 8, scattered=True),  # new tokens, and parts of prompts
    Case((0, 0), (5, 12), 4, scattered=False),  # whole prompts
)


def recorded(call: Call) -> Call:
    """The same step as one that is recorded for any sequences: how long they are stands on the device alone."""
    *tensors, batch = call.args
    rows = len(batch.lengths)
    longest = 3 * max(batch.paging.contexts)
    paging = evolve(batch.paging, exact=False, contexts=(longest,) * rows, runs=(-1,) * rows)
    return evolve(call, label=f"{call.label}, recorded", args=[*tensors, evolve(batch, paging=paging)])


def paged_call(request: KernelRequest, case: Case) -> tuple[Call, KV]:
    """A call of `paged_attention` without its pages, and pages that hold the past."""
    shape, dtype, generator = request.shape, getattr(torch, request.dtype), torch.Generator().manual_seed(3)
    contexts = tuple(p + n for p, n in zip(case.past, case.new, strict=True))
    counts = [-(-c // case.page) for c in contexts]
    order = list(range(1, sum(counts) + 1))  # page 0 is what tables are filled up with
    if case.scattered:
        order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    rest = iter(order)
    split = [list(itertools.islice(rest, n)) for n in counts]
    size = (sum(counts) + 2, case.page, shape.kv_heads, shape.head_dim)
    memory = [torch.full(size, UNWRITTEN, dtype=dtype) for _ in "kv"]
    for pages in memory:
        pages[-1] = torch.nan  # nobody's
        for own, length in zip(split, case.past, strict=True):
            whole = pages[own].flatten(0, 1)
            whole[:length] = torch.randn((length, *size[2:]), generator=generator).to(dtype)
            pages[own] = whole.view(len(own), *size[1:])
    (call,) = calls(evolve(request, operation="attention"), case.new)
    batch = paged_batch(case.new, contexts, split, case.page, device=request.device)
    kv = KV(*(pages.to(request.device) for pages in memory))
    return evolve(call, label=str(case), args=[*call.args[:3], batch]), kv
