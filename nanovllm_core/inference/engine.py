"""The engine: answers join and leave between two forwards, which read prompts and answer at once (Yu et al., 2022).

Each `step` is one forward of the model over the newest tokens of all answers that run, and parts of prompts that wait,
under a budget of tokens; keys and values stand in pages (Kwon et al., 2023) that answers with a like beginning share.
Models that keep something else (`CachingModule`), or nothing, join and leave the same way, without pages. Nothing here
is safe for several threads: see `driving`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from nanovllm_core.contracts import Module, Shape, Tokenizer
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.flight import Asked, Flight
from nanovllm_core.inference.lookup import Lookup
from nanovllm_core.inference.paged import PagedRunner
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.ranks import LeadingRecorder, LeadingRunner, Talk
from nanovllm_core.inference.recording import Recorder, recordable
from nanovllm_core.inference.rows import PREFILL, RowsRunner, WholeRunner
from nanovllm_core.inference.sampling import NotFinite, draws_of, note, penalised
from nanovllm_core.inference.scheduler import Part, Scheduler
from nanovllm_core.inference.sequence import Prompt, Sequence, answers_to

PAGE = 16  # tokens
BUDGET = MappingProxyType({"cpu": 2048, "cuda": 16384})  # tokens of a forward


class Runner(Protocol):
    """Runs the model over the parts of a plan."""

    def forward(self, parts: Many[Part]) -> Tensor: ...

    def keep(self, answered: Many[Sequence], tokens_B: Tensor) -> None: ...

    def has_kept(self, sequence: Sequence) -> bool: ...

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
        budget: int | None = None,
        talk: Talk | None = None,
        ahead: bool | None = None,
        record: bool | None = None,
        guesses: int = 0,
    ) -> None:
        """max_len: positions that prompt and answer may fill together; pages: of the cache, `page_size` tokens each;
        most: answers that are made at once; budget: tokens of a forward, at least `most`, None: by device; talk: with the ranks
        that hold the model together, which follow this one (`ranks.follow`); ahead: queue a forward before the tokens of the
        one before are seen, None: on a GPU; record: run steps of one token a sequence from recordings, None: where kernels
        let it.
        guesses: most tokens of a step that are guessed (`lookup`), where the engine is not ahead, on one rank. Models without pages
        do none of these.

        Raises GenerationError where an answer of `max_len` would not fit in the pages.
        """
        self.module, self.tokenizer, self.max_len, self.device = module, tokenizer, max_len, device
        self.talk, self.pool = talk, None
        self.runner: Runner
        self.recorder: Recorder | None = None
        self.ahead = False
        self._flight: Flight | None = None
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
            self.pool, most = PagePool(pages, page_size), min(most, pages)
            holds = module, shape, self.pool, device, most
            runner = PagedRunner(*holds) if talk is None else LeadingRunner(talk, *holds)
            self.runner = runner
            self.ahead = device == "cuda" if ahead is None else ahead
            if self.ahead and (record or (record is None and recordable(module.ops))):
                given = module, runner.kv, self.pool, runner.last_N, max_len, tokenizer.vocab_size, device
                self.recorder = Recorder(*given) if talk is None else LeadingRecorder(talk, *given)
        self.guesses, self.guessed, self.right = guesses, 0, 0
        budget = PREFILL if self.pool is None else budget or BUDGET[device]
        self.scheduler = Scheduler(self.pool, budget=max(budget, most), most=most)
        if guesses and not self.ahead and talk is None:
            self.scheduler.guess = self._guess

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
        """One forward; the sequences that got a token or ended, some with an `error`.

        Where the device works by itself (`ahead`) they are those of the forward before: this one is queued first, so that the
        device is at work while the host looks at tokens.
        """
        told = [] if self._free() else self._land()
        parts = self.scheduler.plan()
        flight = self._launch(parts) if parts else None
        told += self._land()
        self._flight = flight
        if not self._free():
            told += self._land()
        return told

    def _free(self) -> bool:
        """Whether the next forward may be queued before the tokens of this one are seen."""
        return self.ahead and not any(s.watched for s in self.scheduler.running)

    def _launch(self, parts: list[Part]) -> Flight:
        """Queue a forward and the draws after it."""
        asked = [Asked(part.sequence, part.guesses) for part in parts if part.ends]
        vocabulary, tokens_B = self.tokenizer.vocab_size, None  # rows beyond are padding of the embedding
        if (
            self.recorder is not None
            and len(asked) == len(parts)
            and all(self.runner.has_kept(a.sequence) for a in asked)
        ):
            asked.sort(key=lambda a: -len(a.sequence))  # a device that begins with the longest has no stragglers
            logits_RV, tokens_B = self.recorder.step([a.sequence for a in asked])
        else:
            logits_RV = self.runner.forward(parts)[:, :vocabulary]
        for part in parts:
            self.scheduler.done(part)
        if tokens_B is None:
            asked, logits_RV = self._with_forked(asked, logits_RV)
        each = [a.sequence for a in asked for _ in range(a.rows)]
        if tokens_B is None or any(s.watched or self._filters_itself(s) for s in each):
            draws = draws_of(each, vocabulary, self.device, [i for a in asked for i in range(a.rows)])
            tokens_B = self.module.ops.sample(penalised(logits_RV, each), draws)
            if self.ahead and asked:
                self.runner.keep(each, tokens_B)
        for a in asked:
            a.sequence.drawn += 1
        return Flight.of(asked, logits_RV, tokens_B)

    def _filters_itself(self, sequence: Sequence) -> bool:
        """Whether it is drawn anew after a recorded step, which knew nothing of its filters."""
        assert self.recorder is not None
        return not self.recorder.filters and sequence.params.filters(self.recorder.vocabulary)

    def _with_forked(self, asked: list[Asked], logits_RV: Tensor) -> tuple[list[Asked], Tensor]:
        """With the other answers to prompts that were read to their end, which draw from the same logits."""
        rows, row = list(range(len(logits_RV))), 0
        for a in list(asked):
            if not a.sequence.ids and not a.sequence.drawn:
                forked = self._forked(a.sequence)
                asked = asked + [Asked(other) for other in forked]
                rows += [row] * len(forked)
            row += a.rows
        return asked, logits_RV[rows] if len(rows) > len(logits_RV) else logits_RV

    def _guess(self, sequence: Sequence, most: int) -> Many[int]:
        """What may follow, where few enough answers run that reading more tokens costs little."""
        most = min(most, self.guesses // len(self.scheduler.running))
        if most < 1 or sequence.watched:
            return ()
        if sequence.lookup is None:
            sequence.lookup = Lookup()
        lookup: Lookup = sequence.lookup
        return lookup.guess(sequence, most)

    def _land(self) -> list[Sequence]:
        """The tokens of the forward that was queued: to their sequences, those that are over leave."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        tokens = flight.tokens(self.talk)
        if flight.logits_RV is not None:
            note(flight.logits_RV, [a.sequence for a in flight.asked for _ in range(a.rows)], tokens)
        told, rest = [], iter(tokens)
        for a in flight.asked:
            sequence, drawn = a.sequence, list(itertools.islice(rest, a.rows))
            sequence.drawn -= 1
            if sequence.finish_reason is not None:  # it ended while this was drawn
                continue
            told.append(sequence)
            if not self._taken(sequence, drawn, a.guesses):
                sequence.error = NotFinite()
                self.abort(sequence)
            elif sequence.finish_reason is not None:
                self._remove(sequence)
        for sequence in told:
            if sequence.error is None:
                sequence.show()
        return told

    def _taken(self, sequence: Sequence, drawn: Many[int], guesses: Many[int]) -> bool:
        """Append what was drawn, as far as it was drawn after what is right; False where there was nothing to draw from."""
        right = 0
        for token, guess in zip(drawn, [*guesses, None], strict=True):
            if token < 0:
                return False
            sequence.take(token, self.tokenizer.stop_ids)
            if token != guess or sequence.finish_reason is not None:
                break
            right += 1
        if guesses:
            sequence.computed += right
            assert sequence.lookup is not None
            sequence.lookup.told(len(guesses), right)
            self.guessed, self.right = self.guessed + len(guesses), self.right + right
        self.scheduler.name(sequence)
        return True

    def abort(self, sequence: Sequence) -> None:
        """An answer is not wanted any more; what it has stays in it."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "abort"
            self._remove(sequence)
            sequence.show()

    def fail(self, error: BaseException) -> None:
        """End all answers with an error."""
        self._flight = None
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            sequence.error = error
            self.abort(sequence)

    def forget(self) -> None:
        """Begin anew, when all answers are over: a step that ended anywhere may have left anything between two hands."""
        self.scheduler.forget()

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
