"""The generation loop: prompts in, text out, one batch at a time.

All prompts of a batch are read as packed sequences (no padding), then each step decodes one token for every sequence
that is not finished; those that are leave at once, but a new prompt waits until the whole batch is done. That wait is
the price of the loop being this short. Who keeps what a sequence needs to go on is the model's to say: keys and values
here (`kv.RowCache`), the module itself, or nobody, and then each step reads every sequence again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from attrs import define, field
from torch import Tensor

from nanovllm_core.contracts import Batch, CachingModule, Module, Shape, Tokenizer
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.kv import RowCache
from nanovllm_core.inference.sampling import SamplingParams, sample
from nanovllm_core.inference.stopping import StopTexts

Prompt = str | Sequence[int]
PREFILL = 16_384  # tokens read in one forward pass, unless a single prompt is longer


@define(eq=False)
class Answer:
    """One prompt and what has been generated for it."""

    prompt: list[int]
    params: SamplingParams
    room: int  # most tokens it may get: max_tokens, or what the model's length leaves
    stops: StopTexts
    generator: torch.Generator
    ids: list[int] = field(factory=list)
    text: str | None = None  # set when a stop text was met
    finish_reason: str | None = None

    def take(self, token: int, stop_ids: Sequence[int]) -> None:
        """Append a token and see whether the answer is over."""
        self.ids.append(token)
        if token in stop_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
            return
        self.text = self.stops.found(self.ids)
        if self.text is not None:
            self.finish_reason = "stop"
        elif len(self.ids) == self.room:
            self.finish_reason = "length"

    def output(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The answer as the caller gets it."""
        ended = self.finish_reason == "stop" and self.text is None  # by a stop id, which is no text
        text = tokenizer.decode(self.ids[:-1] if ended else self.ids) if self.text is None else self.text
        return {"text": text, "token_ids": self.ids, "finish_reason": self.finish_reason}


def generate(
    module: Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    *,
    shape: Shape,
    device: str,
    max_len: int,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Continue each prompt: a text (the tokenizer's prefix is put before it), or token ids taken as they are.

    max_len: positions that prompt and answer may fill together
    batch_size: prompts generated together

    Returns one dictionary a prompt, in order: `text` without stop text and special tokens; `token_ids`, all tokens as
    they were drawn, the stop token and those of a stop text included; `finish_reason`, "stop" or "length". Raises
    GenerationError for an empty prompt, one that leaves no room for an answer, or ids that the tokenizer has not.
    """
    if len(prompts) != len(params) or batch_size < 1:
        raise GenerationError(
            f"generate: got {len(prompts)} prompts, {len(params)} parameters, batch size {batch_size}"
        )
    answers = answerable(prompts, params, tokenizer, max_len)
    training = bool(getattr(module, "training", False))
    module.train(False)
    try:
        with torch.inference_mode():
            for begin in range(0, len(answers), batch_size):
                _Batch(module, tokenizer, answers[begin : begin + batch_size], shape, device).run()
    finally:
        module.train(training)
    return [answer.output(tokenizer) for answer in answers]


def answerable(
    prompts: Sequence[Prompt], params: Sequence[SamplingParams], tokenizer: Tokenizer, max_len: int
) -> list[Answer]:
    """Each prompt encoded and found usable. Raises GenerationError as `generate` does."""
    return [
        _answer(i, ids, p, tokenizer, max_len)
        for i, (ids, p) in enumerate(zip(_encoded(prompts, tokenizer), params, strict=True))
    ]


def _encoded(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Iterator[list[int]]:
    encoded = iter(tokenizer.encode([p for p in prompts if isinstance(p, str)]))
    for prompt in prompts:
        yield [*tokenizer.prefix_ids, *next(encoded)] if isinstance(prompt, str) else list(prompt)


def _answer(number: int, ids: list[int], params: SamplingParams, tokenizer: Tokenizer, max_len: int) -> Answer:
    if not ids:
        raise GenerationError(f"prompt {number}: is empty; give some text")
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < tokenizer.vocab_size]
    if wrong:
        raise GenerationError(f"prompt {number}: got token id {wrong[0]!r}, allowed: 0 to {tokenizer.vocab_size - 1}")
    if len(ids) >= max_len:
        raise GenerationError(
            f"prompt {number}: has {len(ids)} tokens, {len(ids) - max_len + 1} too many: prompt and answer share "
            f"{max_len} positions, and an answer needs at least one"
        )
    room = min(params.max_tokens, max_len - len(ids))
    return Answer(ids, params, room, StopTexts(tokenizer, params.stop), params.generator())


class _Batch:
    """Sequences generated together: entry i of `active` uses cache row i."""

    def __init__(self, module: Module, tokenizer: Tokenizer, answers: list[Answer], shape: Shape, device: str) -> None:
        self.module, self.tokenizer, self.device = module, tokenizer, device
        self.active = list(answers)
        dtype = getattr(torch, module.ops.dtype)
        needed = max(len(a.prompt) for a in answers) + 1
        limit = max(len(a.prompt) + a.room for a in answers)
        self.cached = "cache" not in shape.limits
        self.kv: Sequence[Any]
        if not self.cached:
            self.kv = ()
        elif shape.own_cache:
            self.kv = cast("CachingModule", module).new_cache(len(answers), device)
        else:
            self.kv = [RowCache(len(answers), needed, limit, shape, dtype, device) for _ in module.blocks]

    def run(self) -> None:
        self.advance(self.read())
        while self.active:
            self.advance(self.decode() if self.cached else self.read())

    def read(self) -> Tensor:
        """Run each active sequence as a whole; the logits [B, V] after its last token."""
        return torch.cat([self.prefill(first, last) for first, last in self.groups()])

    def groups(self) -> Iterator[tuple[int, int]]:
        """Ranges of sequences that are read together."""
        first, tokens = 0, 0
        for i, answer in enumerate(self.active):
            size = len(answer.prompt) + len(answer.ids)
            if i > first and tokens + size > PREFILL:
                yield first, i
                first, tokens = i, 0
            tokens += size
        yield first, len(self.active)

    def prefill(self, first: int, last: int) -> Tensor:
        """Read whole sequences, packed; the logits [n, V] after the last token of each."""
        prompts = [[*a.prompt, *a.ids] for a in self.active[first:last]]
        lengths = torch.tensor([len(p) for p in prompts])
        ends = lengths.cumsum(0)
        batch = Batch(
            positions=torch.cat([torch.arange(len(p)) for p in prompts]).to(self.device),
            lengths=tuple(lengths.tolist()),
            cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(self.device, torch.int32),
            select=(ends - 1).to(self.device),
            slots=torch.arange(first, last).repeat_interleave(lengths).to(self.device),
        )
        tokens = torch.tensor([i for p in prompts for i in p], device=self.device)
        return self.module(tokens, batch, kv=self.kv if self.cached else None)

    def decode(self) -> Tensor:
        """One more token for each active sequence; the logits [B, V] after it."""
        sizes = [len(a.prompt) + len(a.ids) for a in self.active]
        rows = len(sizes)
        batch = Batch(
            positions=torch.tensor(sizes, device=self.device) - 1,
            lengths=(1,) * rows,
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            slots=torch.arange(rows, device=self.device),
            context=max(sizes),
        )
        return self.module(torch.tensor([a.ids[-1] for a in self.active], device=self.device), batch, kv=self.kv)

    def advance(self, logits_BV: Tensor) -> None:
        """Draw a token for each active sequence; those that are over leave, the last rows take their place."""
        active = self.active
        logits_BV = logits_BV[:, : self.tokenizer.vocab_size]  # rows beyond are padding of the embedding
        tokens = sample(logits_BV, [a.params for a in active], [a.generator for a in active])
        for answer, token in zip(active, tokens, strict=True):
            answer.take(token, self.tokenizer.stop_ids)
        for row in reversed(range(len(active))):
            if active[row].finish_reason is None:
                continue
            last = active.pop()
            if row < len(active):
                active[row] = last
                for cache in self.kv:
                    cache.move(len(active), row)
