"""Steps of one new token a sequence, recorded once for a number of sequences and run again for any (CUDA graphs).

All that differs from step to step stands at fixed places on the device, by slot: a sequence has one while it runs. What is sent for
a step is a row of numbers a sequence, and the pages that are new. Tokens go from a step's draws to the next step's
forward without the host, so it may be a step behind. On a CPU the same step runs without a recording.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm_core.contracts import KV, Batch, Draws, Module, Ops, Paging
from nanovllm_core.errors import GenerationError, reason
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.sent import kept, sent
from nanovllm_core.inference.sequence import Sequence

SLOT, CONTEXT, PLACE, FIRST, SECOND, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(9)  # of a row: fp64 holds all exactly
ROW = 9


class Recorder:
    """Recorded steps of up to `most` sequences."""

    def __init__(
        self, module: Module, kv: Many[KV], pool: PagePool, last_N: Tensor, longest: int, vocabulary: int, device: str
    ) -> None:
        """kv: has one page more than the pool, which nobody reads; last_N: the newest token of each slot, and one slot more;
        longest: tokens of a sequence; vocabulary: tokens that may be drawn."""
        self.module, self.kv, self.pool, self.device = module, kv, pool, device
        self.longest, self.vocabulary, self.last_N = longest, vocabulary, last_N
        self.most = len(last_N) - 1
        self.tables_NP = torch.full((self.most + 1, pool.needed(longest)), pool.count, dtype=torch.int32, device=device)
        self.given_BG = torch.zeros(self.most, ROW, dtype=torch.float64, device=device)
        self.starts_B = torch.arange(self.most + 1, dtype=torch.int32, device=device)
        self.filters = bool(getattr(module.ops.sample, "recordable", False))  # or whoever filters draws anew
        self.rows_B = torch.arange(self.most, device=device)
        # Of each slot: its pages, and how many of them stand in the table.
        self._there: list[tuple[list[int] | None, int]] = [(None, 0)] * self.most
        # By size, and whether rows may have filters.
        self._recorded: dict[tuple[int, bool], tuple[Any, Tensor, Tensor]] = {}
        self._memory: Any = None

    def step(self, sequences: Many[Sequence]) -> tuple[Tensor, Tensor]:
        """The logits [B, V] after the newest token of each, which stands in `last_N`, and the tokens [B] that are drawn from them;
        without `self.filters` as if nothing was filtered. Both hold until the next step."""
        rows_BG = self._rows(sequences)
        logits_BV, tokens_B = self.run(rows_BG, self._new_pages(sequences))
        return logits_BV[: len(sequences)], tokens_B[: len(sequences)]

    def run(self, rows_BG: NDArray[np.float64], new: Many[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """A step of what `step` is told: rows of sequences, and slot, place and page of each page that is new."""
        if new:
            slots, places, pages = sent(new, torch.int64, self.device).unbind(1)
            self.tables_NP[slots, places] = pages.int()
        size = len(rows_BG)
        self.given_BG[:size].copy_(kept(rows_BG, torch.float64, self.device), non_blocking=True)
        asked_BG = rows_BG[:, TOP_K:] != (self.vocabulary, 1, 0)
        return self._run(size, bool(asked_BG.any()))

    def _rows(self, sequences: Many[Sequence]) -> NDArray[np.float64]:
        size = bucket(len(sequences), self.most)
        rows_BG = np.empty((size, ROW))
        # Those that fill up have a slot and a page of their own.
        rows_BG[:] = self.most, 1, self.pool.count * self.pool.size, 0, 0, 0, self.vocabulary, 1, 0
        for row, s in zip(rows_BG, sequences, strict=False):
            page, within = divmod(len(s) - 1, self.pool.size)
            row[:FIRST] = s.slot, len(s), s.pages[page] * self.pool.size + within
            row[TEMPERATURE] = s.params.temperature
            if s.params.temperature > 0:
                row[FIRST : SECOND + 1] = s.uniform()
                if self.filters and s.params.filters(self.vocabulary):
                    k = min(s.params.top_k or self.vocabulary, self.vocabulary)
                    row[TOP_K:] = k, s.params.top_p, s.params.min_p
        return rows_BG

    def _new_pages(self, sequences: Many[Sequence]) -> list[tuple[int, int, int]]:
        new: list[tuple[int, int, int]] = []
        for s in sequences:
            pages, count = self._there[s.slot]
            if pages is not s.pages:  # whoever runs anew has another list
                count = 0
            if count < len(s.pages):
                new += [(s.slot, i, s.pages[i]) for i in range(count, len(s.pages))]
                self._there[s.slot] = s.pages, len(s.pages)
        return new

    def _run(self, size: int, filters: bool) -> tuple[Tensor, Tensor]:
        if self.device != "cuda":
            return self._forward(size, filters)
        if (size, filters) not in self._recorded:
            self._record(size, filters)
        graph, logits_BV, tokens_B = self._recorded[size, filters]
        graph.replay()
        return logits_BV, tokens_B

    def _record(self, size: int, filters: bool) -> None:
        """Run once, so that kernels are compiled and chosen, then record; what was drawn is drawn again."""
        kept_N = self.last_N.clone()
        self._forward(size, filters)
        self.last_N.copy_(kept_N)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                logits_BV, tokens_B = self._forward(size, filters)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise GenerationError(
                f"a step of {size} answers cannot be recorded as a CUDA graph ({reason(e)}): one of its kernels waits for the "
                "device; LLM(enforce_eager=True) or --enforce-eager goes without"
            ) from e
        self._memory = self._memory or graph.pool()
        self._recorded[size, filters] = graph, logits_BV, tokens_B

    def _forward(self, size: int, filters: bool) -> tuple[Tensor, Tensor]:
        """All from what stands at the fixed places."""
        given_BG = self.given_BG[:size]
        whole_3B = torch.empty(FIRST, size, dtype=torch.int64, device=self.device)
        slots_B, contexts_B, places_B = whole_3B.copy_(given_BG[:, :FIRST].T)
        batch = Batch(
            positions=contexts_B - 1,
            lengths=(1,) * size,
            cu_seqlens=self.starts_B[: size + 1],
            paging=Paging(
                contexts=(self.longest,) * size,
                contexts_D=contexts_B.int(),
                tables_DP=self.tables_NP[slots_B],
                runs=(-1,) * size,
                places_T=places_B,
                exact=False,
            ),
        )
        logits_BV = self.module(self.last_N[slots_B], batch, kv=self.kv)[:, : self.vocabulary]
        k_B, p_B, least_B = given_BG[:, TOP_K:].unbind(1)
        draws = Draws(
            temperature_B=given_BG[:, TEMPERATURE].float(),
            top_k_B=k_B.long() if filters else k_B,  # which nobody reads else
            top_p_B=p_B,
            min_p_B=least_B.float() if filters else least_B,
            u_B2=given_BG[:, FIRST : SECOND + 1],
            drawn=True,
            filtered_R=self.rows_B[:size] if filters else None,
        )
        tokens_B = self.module.ops.sample(logits_BV, draws)
        self.last_N.index_copy_(0, slots_B, tokens_B.clamp_min(0))
        return logits_BV, tokens_B


def recordable(ops: Ops) -> bool:
    """Whether attention over pages goes by what the device holds: it says so (`paged_attention.recordable`)."""
    return bool(getattr(ops.paged_attention, "recordable", False))


def bucket(count: int, most: int) -> int:
    """For how many sequences a step of `count` is recorded: a power of two up to 16, then a multiple of 16."""
    size = 1 << (count - 1).bit_length() if count <= 16 else -(-count // 16) * 16
    return min(size, most)
