"""The engine: answers join and leave between two forwards, which read prompts and answer at once (Yu et al., 2022).

Each `step` is one forward of the model over the newest tokens of all answers that run, and parts of prompts that wait,
under a budget of tokens; keys and values stand in pages (Kwon et al., 2023) that answers with a like beginning share.
Models that keep something else (`CachingModule`), or nothing, join and leave the same way, without pages. Nothing here
is safe for several threads: see `driving`.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import torch
from torch import Tensor

from nanovllm_core.contracts import Module, Shape, Tokenizer
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.paged import PagedRunner
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.ranks import Talk, leading
from nanovllm_core.inference.rows import PREFILL, RowsRunner, WholeRunner
from nanovllm_core.inference.sampling import NotFinite, draw
from nanovllm_core.inference.scheduler import Part, Scheduler
from nanovllm_core.inference.sequence import Prompt, Sequence, answers_to

PAGE = 16  # tokens
BUDGET = 2048  # tokens of a forward


class Runner(Protocol):
    """Runs the model over the parts of a plan."""

    def forward(self, parts: Many[Part]) -> Tensor: ...

    def copy(self, source: int, target: int) -> None: ...

    def left(self, row: int, last: int) -> None: ...


class Engine:
    """A model that answers many prompts at once."""

    def __init__(
        self,
        module: Module,
        tokenizer: Tokenizer,
        shape: Shape,
        device: str,
        *,
        max_len: int,
        pages: int,
        page_size: int = PAGE,
        most: int = 256,
        budget: int = BUDGET,
        talk: Talk | None = None,
    ) -> None:
        """max_len: positions that prompt and answer may fill together; pages: of the cache, `page_size` tokens each;
        most: answers that are made at once; budget: tokens of a forward, at least `most`; talk: with the ranks that hold the model
        together, which follow this one (`ranks.follow`).

        Raises GenerationError where an answer of `max_len` would not fit in the pages.
        """
        self.module, self.tokenizer, self.max_len = module, tokenizer, max_len
        self.pool: PagePool | None = None
        self.runner: Runner
        if "cache" in shape.limits:
            self.runner = WholeRunner(module, device)
        elif shape.own_cache:
            self.runner = RowsRunner(module, most, device)
        else:
            if pages * page_size < max_len:
                raise GenerationError(
                    f"the cache has room for {pages * page_size} tokens, an answer may have {max_len}: set max_model_len lower, or "
                    "give the cache more memory"
                )
            self.pool = PagePool(pages, page_size)
            runner = PagedRunner(module, shape, self.pool, device)
            self.runner = runner if talk is None else leading(runner, talk)
        budget = PREFILL if self.pool is None else budget
        self.scheduler = Scheduler(self.pool, budget=max(budget, most), most=most)

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return self.scheduler.busy

    def answers(self, prompts: Many[Prompt], params: Many[SamplingParams]) -> list[list[Sequence]]:
        """The `n` sequences that answer each prompt, to be enqueued. Raises GenerationError where one cannot be answered."""
        return answers_to(prompts, params, self.tokenizer, self.max_len)

    def enqueue(self, sequences: Many[Sequence]) -> None:
        """Let them wait for their turn."""
        self.scheduler.waiting.extend(sequences)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One forward; the sequences that got a token or ended, some with an `error`."""
        parts = self.scheduler.plan()
        logits_RV = self.runner.forward(parts)
        logits_RV = logits_RV[:, : self.tokenizer.vocab_size]  # rows beyond are padding of the embedding
        for part in parts:
            self.scheduler.done(part)
        answered = [part.sequence for part in parts if part.ends]
        rows = list(range(len(answered)))
        for row, sequence in enumerate(list(answered)):
            if not sequence.ids:
                forked = self._forked(sequence)
                answered += forked
                rows += [row] * len(forked)
        if not answered:
            return []
        if len(rows) > len(logits_RV):
            logits_RV = logits_RV[rows]
        try:
            tokens = draw(logits_RV, answered)
        except NotFinite as e:  # those answers' own
            bad = [answered[row] for row in e.rows]
            for sequence in bad:
                sequence.error = e
                self.abort(sequence)
            good = [row for row, sequence in enumerate(answered) if sequence.error is None]
            if not good:
                return bad
            return bad + self._take(
                [answered[row] for row in good], draw(logits_RV[good], [answered[row] for row in good])
            )
        return self._take(answered, tokens)

    def _take(self, answered: list[Sequence], tokens: Many[int]) -> list[Sequence]:
        for sequence, token in zip(answered, tokens, strict=True):
            sequence.take(token, self.tokenizer.stop_ids)
        for sequence in answered:
            if sequence.finish_reason is not None:
                self._remove(sequence)
            sequence.show()
        return answered

    def abort(self, sequence: Sequence) -> None:
        """An answer is not wanted any more; what it has stays in it."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "abort"
            self._remove(sequence)
            sequence.show()

    def fail(self, error: BaseException) -> None:
        """End all answers with an error."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            sequence.error = error
            self.abort(sequence)

    def forget(self) -> None:
        """Count all pages as free and unknown: a step that ended anywhere may have left one between two hands."""
        if self.pool is not None:
            self.pool.forget()

    def _remove(self, sequence: Sequence) -> None:
        moved = self.scheduler.remove(sequence)
        if moved is not None:
            self.runner.left(*moved)

    def _forked(self, sequence: Sequence) -> list[Sequence]:
        """Those of the other answers to its prompt that could join it now."""
        joined = []
        for other in [s for s in sequence.siblings if s.finish_reason is None]:
            copies = self.scheduler.fork(other, sequence)
            if copies is None:
                break
            for source, target in copies:
                self.runner.copy(source, target)
            joined.append(other)
        return joined
