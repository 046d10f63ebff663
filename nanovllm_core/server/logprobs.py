"""Log-probabilities as OpenAI's two APIs show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from nanovllm_core.contracts import Tokenizer

KEPT = 1 << 16  # texts of tokens
LEAST = -9999.0  # stands for minus infinity, which is no JSON


class TokenTexts:
    """The text of single tokens; special ones have none, part of a character is U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self.of = lru_cache(KEPT)(self._of)

    def _of(self, token: int) -> str:
        """Behind another token, since some tokenizers leave out the space that begins a text."""
        once, twice = self._decode([token]), self._decode([token, token])
        return twice[len(once) :] if twice.startswith(once) else once


Noted = Sequence[Mapping[str, Any]]  # `logprobs` of the engine


def of_chat(noted: Noted, texts: TokenTexts) -> dict[str, Any]:
    """One entry a token, an end token among them."""

    def shown(found: Mapping[str, Any]) -> dict[str, Any]:
        text = texts.of(found["token_id"])
        whole = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": max(found["logprob"], LEAST), "bytes": whole}

    content = [{**shown(one), "top_logprobs": [shown(other) for other in one["top"]]} for one in noted]
    return {"content": content, "refusal": None}


def of_completion(noted: Noted, texts: TokenTexts, offset: int) -> dict[str, Any]:
    """One entry a token, an end token among them; `offset`: characters of the answer before them."""
    tokens = [texts.of(one["token_id"]) for one in noted]
    return {
        "tokens": tokens,
        "token_logprobs": [max(one["logprob"], LEAST) for one in noted],
        "top_logprobs": [
            {texts.of(t["token_id"]): max(t["logprob"], LEAST) for t in reversed(one["top"])} for one in noted
        ],
        "text_offset": list(_starts(tokens, offset)),
    }


def _starts(tokens: Iterable[str], offset: int) -> Iterable[int]:
    for token in tokens:
        yield offset
        offset += len(token)
