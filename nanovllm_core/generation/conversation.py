"""A conversation with a model: what was said, and the next answer as it is made.

An answer that is ended early counts as far as it got. What does not fit into the model's length is never cut silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attrs import evolve

from nanovllm_core.chat import chat_ids
from nanovllm_core.errors import GenerationError, ModelError
from nanovllm_core.generation.questions import seed_of
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.streaming import Pieces
from nanovllm_core.llm import LLM


class Conversation:
    """Messages in turn, begun by `system` where it is given. Raises ModelError where the model holds no conversations."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, name: str) -> None:
        self.llm, self.params = llm, params
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first)
        self.turn = 0
        self.note = ""  # what is to be said of the newest answer
        if not llm.tokenizer.has_chat_template:
            raise ModelError(
                f"{name}: the model has no chat template, so it was not made for conversations; `nanovllm generate {name} "
                "--prompt ...` continues a text"
            )
        chat_ids(llm.tokenizer, [*self.first, {"role": "user", "content": "?"}])  # or say so at once

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self.first)

    def answer(self, text: str, stopped: Callable[[], bool]) -> Iterator[str]:
        """Pieces of the answer to a message; `stopped` is asked between two tokens.

        Raises GenerationError when the conversation has outgrown the model; the message is not part of it then.
        """
        engine, tokenizer, most = self.llm.engine, self.llm.tokenizer, self.llm.max_model_len
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(tokenizer, asked)
        if len(ids) >= most:
            raise GenerationError(
                f"with this message the conversation has {len(ids):,} tokens, and the model takes {most:,} with the answer: send a "
                "shorter one, or begin a new conversation with /reset"
            )
        seed = None if self.params.seed is None else seed_of(self.params.seed, self.turn)
        self.turn += 1
        [[sequence]] = engine.answers([ids], [evolve(self.params, seed=seed)])
        pieces, said = Pieces(sequence, tokenizer), ""
        engine.enqueue([sequence])
        try:
            while sequence.finish_reason is None:
                if stopped():
                    engine.abort(sequence)
                else:
                    engine.step()
                piece = pieces.more()
                if piece is not None and piece["text"]:
                    said += piece["text"]
                    yield piece["text"]
        finally:
            engine.abort(sequence)
            if said or sequence.finish_reason != "abort":
                self.messages = [*asked, {"role": "assistant", "content": said}]
        if sequence.error is not None:
            raise sequence.error
        self.note = ""
        if sequence.finish_reason == "length":
            self.note = f"the answer ends at --max-tokens {self.params.max_tokens:,}"
            if len(sequence) >= most:
                self.note = f"the conversation fills the model's {most:,} tokens; begin a new one with /reset"
