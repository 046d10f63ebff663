"""Answers piece by piece: the text that is new and cannot change any more."""

from __future__ import annotations

from typing import Any

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.inference.sequence import Sequence
from nanovllm_core.inference.stopping import GrowingText


class Pieces:
    """One answer's pieces, as they can be told."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.sequence, self.tokenizer = sequence, tokenizer
        self._growing = GrowingText(tokenizer)
        self._told = ""
        self._tokens = 0  # that were told
        self.over = False  # the last piece was told

    def more(self) -> dict[str, Any] | None:
        """What is new: `prompt`, `index` of the answer to it, `text`, `token_ids`, `finish_reason` (None before the last),
        `logprobs` where asked for; None when there is no new token.

        A part of a character, and what may be the beginning of a stop text, wait. All texts together are the answer's.
        """
        s = self.sequence
        count, reason = s.shown  # a thread may be adding to the rest
        if self.over or (self._tokens == count and reason is None):
            return None
        ids = s.ids[self._tokens : count]
        if reason is not None:
            self.over = True
            text = s.output(self.tokenizer)["text"]
        else:
            self._growing.grow(s.ids[:count])
            text = self._growing.text
            text = text[: len(text) - s.stops.held_back(text)]
        piece: dict[str, Any] = {
            "prompt": s.number,
            "index": s.index,
            "text": text[len(self._told) :],
            "token_ids": ids,
            "finish_reason": reason,
        }
        if s.params.logprobs is not None:
            piece["logprobs"] = s.logprobs[self._tokens : count]
        self._told, self._tokens = text if len(text) > len(self._told) else self._told, count
        return piece
