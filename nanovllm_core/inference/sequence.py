"""One answer while it is made: its tokens, where it stands, when it is over."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.stopping import StopTexts
from nanovllm_core.inference.uniform import uniforms

AHEAD = 64  # tokens whose random numbers are made at once
Prompt = str | Many[int]


@define(eq=False)
class Sequence:
    """One answer: prompt and generated tokens, and what the engine keeps of them."""

    prompt: list[int]
    params: SamplingParams
    room: int  # most tokens it may get: max_tokens, or what the model's length leaves
    stops: StopTexts
    number: int = 0  # of the prompt among those asked together
    index: int = 0  # of the answers to it
    like: Sequence | None = None  # answers the same prompt, and is to be read first
    ids: list[int] = field(factory=list)
    drawn: int = 0  # tokens after these that only the device knows yet
    logprobs: list[dict[str, Any]] = field(factory=list)
    text: str | None = None  # set when a stop text was met
    finish_reason: str | None = None
    error: BaseException | None = None  # that ended it
    computed: int = 0  # tokens whose keys and values are in the pages
    slot: int = -1  # its place on the device while it runs
    pages: list[int] = field(factory=list)
    keys: list[bytes] = field(factory=list)  # of its full pages as far as anyone asked, whether it has these or not
    named: int = 0  # of its pages, those whose tokens are computed and known
    advanced: Callable[[], None] | None = None  # called when it got a token or is over
    lookup: Any = None  # guesses at its next tokens (`lookup.Lookup`)
    shown: tuple[int, str | None] = (0, None)  # tokens, and why it is over: what other threads may read of it
    met: set[int] | None = field(init=False)  # tokens that it has, where they are made less likely
    siblings: list[Sequence] = field(factory=list)  # the other answers to its prompt; of the first one alone
    seed: int = field(init=False)
    _chances: tuple[int, NDArray[np.float64]] = field(init=False)  # random numbers, from those of a position on

    def __attrs_post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self._chances = 0, np.empty((0, 2))
        self.met = None if self.params.repetition_penalty == 1 else {*self.prompt, *self.ids}
        if self.like is not None:
            self.like.siblings.append(self)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids) + self.drawn

    @property
    def known(self) -> int:
        """Tokens that the host knows."""
        return len(self.prompt) + len(self.ids)

    @property
    def full(self) -> bool:
        """Whether it has got, or will have got, all tokens that it may get."""
        return len(self.ids) + self.drawn >= self.room

    @property
    def watched(self) -> bool:
        """Whether the host must see each token before the next is drawn, or the logits that it is drawn from."""
        return self.met is not None or self.params.logprobs is not None

    def uniform(self, after: int = 0) -> NDArray[np.float64]:
        """The two random numbers of the next token, or of one that is to come `after` so many others."""
        first, chances = self._chances
        at = len(self) + after - first
        if not 0 <= at < len(chances):
            first, at = len(self) + after, 0
            chances = uniforms(self.seed, first, AHEAD)
            self._chances = first, chances
        found: NDArray[np.float64] = chances[at]
        return found

    def tokens(self, first: int, last: int) -> list[int]:
        """Tokens first to last - 1 of prompt and answer, as far as they are known."""
        n = len(self.prompt)
        if first >= n:
            return self.ids[first - n : last - n]
        return self.prompt[first:last] if last <= n else self.prompt[first:] + self.ids[: last - n]

    def take(self, token: int, stop_ids: Many[int]) -> None:
        """Append a token and see whether the answer is over."""
        self.ids.append(token)
        if self.met is not None:
            self.met.add(token)
        if token in self.params.stop_token_ids or (token in stop_ids and not self.params.ignore_eos):
            self.finish_reason = "stop"
            return
        self.text = self.stops.found(self.ids)
        if self.text is not None:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.room:
            self.finish_reason = "length"

    def show(self) -> None:
        """Let other threads see the token that it got, or that it is over, as one."""
        self.shown = len(self.ids), self.finish_reason
        advanced = self.advanced  # which another thread may take away
        if advanced is not None:
            advanced()

    def output(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The answer as the caller gets it."""
        ended = self.finish_reason == "stop" and self.text is None  # by a stop id, which is no text
        text = tokenizer.decode(self.ids[:-1] if ended else self.ids) if self.text is None else self.text
        found: dict[str, Any] = {"text": text, "token_ids": self.ids, "finish_reason": self.finish_reason}
        return found if self.params.logprobs is None else {**found, "logprobs": self.logprobs}


def answers_to(
    prompts: Many[Prompt], params: Many[SamplingParams], tokenizer: Tokenizer, max_len: int
) -> list[list[Sequence]]:
    """The `n` sequences that answer each prompt: a text, which gets the tokenizer's prefix, or token ids as they are.

    max_len: positions that prompt and answer may fill together. Raises GenerationError where a prompt cannot be answered.
    """
    texts = iter(tokenizer.encode([p for p in prompts if isinstance(p, str)]))
    found = []
    for number, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
        ids = [*tokenizer.prefix_ids, *next(texts)] if isinstance(prompt, str) else list(prompt)
        _check(number, ids, tokenizer, max_len)
        room = min(given.max_tokens, max_len - len(ids))
        sequences = list[Sequence]()
        for i in range(given.n):
            like = sequences[0] if sequences else None
            sequences.append(Sequence(ids, given.single(i), room, StopTexts(tokenizer, given.stop), number, i, like))
        found.append(sequences)
    return found


def _check(number: int, ids: list[int], tokenizer: Tokenizer, max_len: int) -> None:
    if not ids:
        raise GenerationError(f"prompt {number}: is empty; give some text")
    ids_there = tokenizer.vocab_size
    if {*map(type, ids)} != {int} or min(ids) < 0 or max(ids) >= ids_there:
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < ids_there)
        raise GenerationError(f"prompt {number}: got token id {wrong!r}, allowed: 0 to {ids_there - 1}")
    if len(ids) >= max_len:
        raise GenerationError(
            f"prompt {number}: has {len(ids)} tokens, {len(ids) - max_len + 1} too many: prompt and answer share "
            f"{max_len} positions, and an answer needs at least one"
        )
