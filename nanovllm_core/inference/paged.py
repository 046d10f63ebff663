"""Running a model over pages: the memory of keys and values, and the batch that tells where each token's stand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from nanovllm_core.contracts import KV, Batch, Module, Paging, Shape
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.scheduler import Part
from nanovllm_core.inference.sent import sent
from nanovllm_core.inference.sequence import Sequence


def page_bytes(shape: Shape, size: int, dtype: str) -> int:
    """Memory of one page of all blocks."""
    return 2 * shape.layers * size * shape.kv_heads * shape.head_dim * (4 if dtype == "float32" else 2)


@frozen(eq=False)
class Reading:
    """What a forward reads of some sequences, as plain numbers."""

    tokens: Many[int]
    lengths: Many[int]  # new tokens of each sequence
    contexts: Many[int]  # tokens that each has then
    pages: Many[Many[int]]
    select: Many[int]  # of the tokens, those after which logits are wanted
    unknown: Many[tuple[int, int]] = ()  # places among the tokens, and the slots where these stand

    @classmethod
    def of(cls, parts: Many[Part]) -> Reading:
        """Logits are wanted after each part that reaches its sequence's end, and after each of its guesses."""
        tokens: list[int] = []
        select: list[int] = []
        unknown: list[tuple[int, int]] = []
        for part in parts:
            known = part.sequence.tokens(part.first, part.last)
            if len(known) < part.last - part.first:
                unknown.append((len(tokens), part.sequence.slot))
                known = [0]
            tokens += [*known, *part.guesses]
            if part.ends:
                select += range(len(tokens) - 1 - len(part.guesses), len(tokens))
        lengths = [part.length for part in parts]
        contexts, pages = [part.first + part.length for part in parts], [part.sequence.pages for part in parts]
        return cls(tokens, lengths, contexts, pages, select, unknown)


class PagedRunner:
    """The parts of a plan through the model."""

    def __init__(self, module: Module, shape: Shape, pool: PagePool, device: str, most: int = 0) -> None:
        """most: sequences whose newest tokens are kept on the device (`keep`)."""
        self.module, self.pool, self.device = module, pool, device
        size = (pool.count + 1, pool.size, shape.kv_heads, shape.head_dim)  # the last page is nobody's
        dtype = getattr(torch, module.ops.dtype)
        self.kv = [KV(*(_zeros(size, dtype, device) for _ in "kv")) for _ in module.blocks]
        self.last_N = torch.zeros(most + 1, dtype=torch.int64, device=device)
        self._kept: list[list[int] | None] = [None] * most  # pages of the sequence whose token that is

    def keep(self, answered: Many[Sequence], tokens_B: Tensor) -> None:
        """Let the newest tokens of these stand by slot, where the next step finds them."""
        self.place([s.slot for s in answered], tokens_B)
        for s in answered:
            self._kept[s.slot] = s.pages

    def place(self, slots: Many[int], tokens_B: Tensor) -> None:
        """The newest tokens of slots."""
        self.last_N.index_copy_(0, sent(slots, torch.int64, self.device), tokens_B.clamp_min(0))

    def has_kept(self, sequence: Sequence) -> bool:
        """Whether the newest token of a sequence stands on the device."""
        return self._kept[sequence.slot] is sequence.pages  # it has another list when it begins again

    def forward(self, parts: Many[Part]) -> Tensor:
        """The logits [n, V] after each part that reaches its sequence's end, in order, and after each of its guesses."""
        return self.run(Reading.of(parts))

    def run(self, reading: Reading) -> Tensor:
        """The logits [n, V] that are wanted."""
        r = reading
        batch = paged_batch(r.lengths, r.contexts, r.pages, self.pool.size, r.select, self.device)
        tokens_T = sent(r.tokens, torch.int64, self.device)
        if r.unknown:
            places, slots = sent(r.unknown, torch.int64, self.device).unbind(1)
            tokens_T[places] = self.last_N[slots]
        return self.module(tokens_T, batch, kv=self.kv)

    def copy(self, source: int, target: int) -> None:
        """A page's keys and values to another."""
        for kv in self.kv:
            for pages in (kv.k_PSKH, kv.v_PSKH):
                pages[target] = pages[source]

    def left(self, row: int, last: int) -> None:
        """Nothing stands in rows here."""


def paged_batch(
    lengths: Many[int],
    contexts: Many[int],
    pages: Many[Many[int]],
    size: int,
    select: Many[int] | None = None,
    device: str = "cpu",
) -> Batch:
    """The newest `lengths` tokens of sequences that then have `contexts` tokens, in these pages of `size` tokens each."""
    used = [own[: -(-context // size)] for own, context in zip(pages, contexts, strict=True)]
    tables_DP = np.zeros((len(used), max(map(len, used))), np.int32)
    for row, own in zip(tables_DP, used, strict=True):
        row[: len(own)] = own
    lengths_D = np.array(lengths)
    bounds = np.array([0, *itertools.accumulate(lengths)])
    documents_T = np.arange(len(used)).repeat(lengths_D)
    positions_T = np.arange(len(documents_T)) + (np.array(contexts) - lengths_D - bounds[:-1])[documents_T]
    places_T = tables_DP[documents_T, positions_T // size].astype(np.int64) * size + positions_T % size
    return Batch(
        positions=sent(positions_T, torch.int64, device),
        lengths=tuple(lengths),
        cu_seqlens=sent(bounds, torch.int32, device),
        select=None if select is None else sent(select, torch.int64, device),
        paging=Paging(
            contexts=tuple(contexts),
            contexts_D=sent(contexts, torch.int32, device),
            tables_DP=sent(tables_DP, torch.int32, device),
            runs=tuple(own[0] if own[-1] - own[0] == len(own) - 1 and _follow(own) else -1 for own in used),
            places_T=sent(places_T, torch.int64, device),
        ),
    )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """What a mask leaves out must be finite. On a CPU the system gives the memory when it is first written: numpy asks it for
    zeros, where torch writes them."""
    if device != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    bits = np.zeros(size, np.float32 if dtype == torch.float32 else np.uint16)
    return torch.from_numpy(bits).view(dtype)


def _follow(pages: Many[int]) -> bool:
    """Whether pages stand one after the other in memory."""
    return all(b == a + 1 for a, b in itertools.pairwise(pages))
