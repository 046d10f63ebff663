"""A conversation as the token ids of a prompt, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.data.shield import Shield, specials_of
from nanovllm_core.errors import GenerationError


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of the conversation up to where the assistant would begin; special tokens that a message spells out stay text.

    Raises GenerationError for what is no conversation, ModelError where there is no template or it refuses.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise GenerationError(f"chat: got {messages!r:.80}, allowed: a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise GenerationError(f"chat: message {i}: got {message!r:.80}, allowed: {{'role': text, 'content': text}}")
    if not messages:
        raise GenerationError("chat: there is no message; give at least one")
    shield = Shield(specials_of(tokenizer), [m["content"] for m in messages])
    hidden = [{"role": m["role"], "content": shield.hide(m["content"])} for m in messages]
    pieces = shield.pieces(tokenizer.chat(hidden, answer_next=True))
    ids: list[int] = []
    for text, markup in pieces:
        ids += tokenizer.encode([text], markup=markup)[0]
    prefix = list(tokenizer.prefix_ids)
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
