"""All answers to a list of prompts, by an engine made for them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

from nanovllm_core.contracts import Module, Shape, Tokenizer
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.engine import PAGE, Engine
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sequence import Prompt, Sequence, answers_to


def generate(
    module: Module,
    tokenizer: Tokenizer,
    prompts: Many[Prompt],
    params: Many[SamplingParams],
    *,
    shape: Shape,
    device: str,
    max_len: int,
    most: int = 32,
) -> list[dict[str, Any]]:
    """Continue each prompt: a text (the tokenizer's prefix is put before it), or token ids taken as they are.

    max_len: positions that prompt and answer may fill together
    most: answers made at once

    Returns one dictionary an answer, in order: `text` without stop text and special tokens; `token_ids`, all tokens as
    they were drawn, the stop token and those of a stop text included; `finish_reason`, "stop" or "length"; `logprobs` where
    asked for. Raises GenerationError for an empty prompt, one that leaves no room for an answer, or ids that the tokenizer
    has not.
    """
    asked = [s for sequences in answerable(prompts, params, tokenizer, max_len) for s in sequences]
    if not asked:
        return []
    sizes = sorted((len(s.prompt) + s.room for s in asked), reverse=True)
    most = min(most, len(asked))
    pages = sum(-(-size // PAGE) for size in sizes[:most])
    with evaluating(module):
        engine = Engine(module, tokenizer, shape, device, max_len=sizes[0], pages=pages, most=most, ahead=False)
        engine.enqueue(asked)
        while engine.busy:
            for sequence in engine.step():
                if sequence.error is not None:
                    raise sequence.error
    return [sequence.output(tokenizer) for sequence in asked]


def answerable(
    prompts: Many[Prompt], params: Many[SamplingParams], tokenizer: Tokenizer, max_len: int
) -> list[list[Sequence]]:
    """The answers to be made. Raises GenerationError as `generate` does."""
    if len(prompts) != len(params):
        raise GenerationError(f"generate: got {len(prompts)} prompts and {len(params)} parameters")
    return answers_to(prompts, params, tokenizer, max_len)


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """The module in evaluation, and afterwards as it was."""
    training = bool(getattr(module, "training", False))
    module.train(False)
    try:
        yield
    finally:
        module.train(training)
