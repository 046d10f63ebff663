"""Tokens on their way from the device: what was asked of a forward, and how the host gets it."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from nanovllm_core.inference.ranks import Talk
from nanovllm_core.inference.sequence import Sequence

LOOK = 0.2  # seconds between two looks at whether the other ranks live


@frozen(eq=False)
class Asked:
    """A sequence whose next token is drawn, and those after its guesses."""

    sequence: Sequence
    guesses: Many[int] = ()

    @property
    def rows(self) -> int:
        """Of logits."""
        return 1 + len(self.guesses)


@frozen(eq=False)
class Flight:
    """Tokens of sequences that were drawn, or will have been when the device comes to it."""

    asked: list[Asked]
    logits_RV: Tensor | None  # where somebody asked for log-probabilities
    _tokens_R: Tensor
    _there: Any  # the event after which the host has them

    @classmethod
    def of(cls, asked: list[Asked], logits_RV: Tensor, tokens_R: Tensor) -> Flight:
        """Queues their way to the host."""
        there = None
        if tokens_R.is_cuda:
            host_R = torch.empty(tokens_R.shape, dtype=tokens_R.dtype, pin_memory=True)
            tokens_R, there = host_R.copy_(tokens_R, non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        told = any(a.sequence.params.logprobs is not None for a in asked)
        return cls(asked, logits_RV if told else None, tokens_R, there)

    def tokens(self, talk: Talk | None = None) -> list[int]:
        """Waits for them; with other ranks only while these live. Raises GenerationError where one does not."""
        if talk is not None:
            look = 0.0
            while self._there is not None and not self._there.query():
                if time.monotonic() > look:
                    talk.check()  # the device would wait forever
                    look = time.monotonic() + LOOK
                time.sleep(0)
            talk.check()  # what was drawn without one of the ranks is nothing
        elif self._there is not None:
            self._there.synchronize()
        found: list[int] = self._tokens_R.tolist()
        return found
