"""Answers in the shapes of OpenAI's two APIs, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from attrs import define, field

from nanovllm_core.server.asked import Asked
from nanovllm_core.server.logprobs import TokenTexts, of_chat, of_completion


@define
class Choice:
    """What is told of one answer so far."""

    text: list[str] = field(factory=list)
    noted: list[Mapping[str, Any]] = field(factory=list)  # log-probabilities that are not told yet
    offset: int = 0  # characters of the tokens whose log-probabilities were told
    finish_reason: str | None = None


class Shaper:
    """One request's answers, from pieces."""

    def __init__(self, asked: Asked, model: str, texts: TokenTexts) -> None:
        self.asked, self.model, self.texts = asked, model, texts
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.tokens = 0  # of the answers
        self.choices = [Choice() for _ in range(asked.answers)]

    def take(self, index: int, piece: Mapping[str, Any]) -> None:
        """A piece for the whole answer."""
        choice = self.choices[index]
        choice.text.append(piece["text"])
        self._note(choice, piece)

    def _note(self, choice: Choice, piece: Mapping[str, Any]) -> None:
        self.tokens += len(piece["token_ids"])
        choice.noted += piece.get("logprobs", ())
        choice.finish_reason = piece["finish_reason"]

    @property
    def usage(self) -> dict[str, int]:
        read = self.asked.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}

    def whole(self) -> dict[str, Any]:
        """The answers, when all pieces are taken."""
        choices = list[dict[str, Any]]()
        for index, choice in enumerate(self.choices):
            text = "".join(choice.text)
            said: dict[str, Any] = {"text": text}
            if self.asked.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, choice, said))
        return {**self._frame(chunk=False), "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece: who speaks."""
        if not self.asked.chat:
            return []
        said = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return [self._chunk([self._choice(i, choice, said)]) for i, choice in enumerate(self.choices)]

    def chunk(self, index: int, piece: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a piece adds; None while it adds nothing that can be told."""
        choice = self.choices[index]
        self._note(choice, piece)
        text = piece["text"]
        if not text and not choice.noted and choice.finish_reason is None:
            return None
        said: dict[str, Any] = {"text": text}
        if self.asked.chat:
            said = {"delta": {"content": text} if text else {}}
        return self._chunk([self._choice(index, choice, said)])

    def closing(self) -> list[dict[str, Any]]:
        """Chunks behind the last piece: what was used, where that was asked for."""
        return [{**self._chunk([]), "usage": self.usage}] if self.asked.usage else []

    def _frame(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.asked.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._frame(chunk=True), "choices": choices, **usage}

    def _choice(self, index: int, choice: Choice, said: Mapping[str, Any]) -> dict[str, Any]:
        """Finished the engine's way is finished OpenAI's way: `stop` or `length`."""
        told = None
        if choice.noted:
            if self.asked.chat:
                told = of_chat(choice.noted, self.texts)
            else:
                told = of_completion(choice.noted, self.texts, choice.offset)
                choice.offset += sum(map(len, told["tokens"]))
            choice.noted = []
        return {"index": index, **said, "logprobs": told, "finish_reason": choice.finish_reason}
