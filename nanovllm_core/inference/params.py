"""How one prompt is to be continued."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from attrs import evolve, field, frozen

from nanovllm_core.errors import GenerationError

MOST_LOGPROBS = 100


def _several(given: Any) -> tuple[Any, ...]:
    """None, one, or several of something; whether they are good is looked at afterwards."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


@frozen(kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    temperature: 0 takes the likeliest token always; 1 draws from the model's own distribution
    top_k: draw from this many likeliest tokens; None: all
    top_p: draw from the fewest likeliest tokens that together have this probability (Holtzman et al., 2020)
    min_p: draw from the tokens that have at least this share of the likeliest one's probability (Nguyen et al., 2024)
    repetition_penalty: divides positive logits, and multiplies others, of tokens that prompt or answer have (Keskar et al.,
        2019); 1: none
    max_tokens: longest answer, in tokens
    stop: a text, or several, that ends the answer and is left out of it
    stop_token_ids: tokens that end the answer, beside the model's own end tokens; their text is left out of it
    seed: of this answer's draws; None: another at each call. Of `n` answers the i-th draws with seed + i
    n: answers to the prompt
    logprobs: give the log-probability of each token of the answer, and of this many likeliest ones; None: of none
    ignore_eos: go on after the model's end tokens

    The filters apply in the order of this list. Raises GenerationError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = field(default=(), converter=_several)
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_several)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False

    def __attrs_post_init__(self) -> None:
        for name, (good, allowed) in _ALLOWED.items():
            if not good(value := getattr(self, name)):
                raise GenerationError(f"SamplingParams: {name}: got {value!r:.80}, {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def filters(self, vocabulary: int) -> bool:
        """Whether some of so many tokens may not be drawn."""
        return self.top_p < 1 or self.min_p > 0 or (self.top_k is not None and self.top_k < vocabulary)

    def single(self, i: int) -> SamplingParams:
        """Those of the i-th of `n` answers."""
        if self.n == 1:
            return self
        return evolve(self, n=1, seed=None if self.seed is None else (self.seed + i) % 2**63)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType({
    "temperature": (lambda v: _number(v) and v >= 0, "allowed: a number from 0 on"),
    "top_k": (lambda v: v is None or (_whole(v) and v >= 1), "allowed: None, or 1 and more"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "allowed: above 0 and at most 1"),
    "min_p": (lambda v: _number(v) and 0 <= v <= 1, "allowed: 0 to 1"),
    "repetition_penalty": (lambda v: _number(v) and 0.01 <= v <= 100, "allowed: 0.01 to 100"),
    "max_tokens": (lambda v: _whole(v) and v >= 1, "allowed: 1 and more"),
    "stop": (
        lambda v: len(v) <= 64 and all(isinstance(s, str) and 0 < len(s) <= 1000 for s in v),
        "allowed: up to 64 texts of 1 to 1000 characters",
    ),
    "stop_token_ids": (lambda v: all(_whole(i) and i >= 0 for i in v), "allowed: token ids"),
    "seed": (lambda v: v is None or (_whole(v) and 0 <= v < 2**63), "allowed: None, or 0 to 2**63 - 1"),
    "n": (lambda v: _whole(v) and 1 <= v <= 1024, "allowed: 1 to 1024"),
    "logprobs": (lambda v: v is None or (_whole(v) and 0 <= v <= MOST_LOGPROBS), f"allowed: None, or 0 to {MOST_LOGPROBS}"),
    "ignore_eos": (lambda v: isinstance(v, bool), "allowed: True or False"),
})  # fmt: skip
