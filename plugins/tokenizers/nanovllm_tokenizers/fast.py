"""contracts.Tokenizer over a `tokenizers.Tokenizer`: what the bundled tokenizers share.

One Rust object serves both ways of reading text; its switch `encode_special_tokens` (True: special tokens written in a
text are plain text) is set before each call, under a lock. Tokens that a tokenizer adds but does not call special (such
as Qwen3's `<think>`) are text by its own word and are read as it reads them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm_core.errors import DataError, ModelError

if TYPE_CHECKING:
    import tokenizers


class FastTokenizer:
    """All of `contracts.Tokenizer` but `save`, through `backend`, whose truncation and padding it switches off."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        prefix_ids: Sequence[int],
        end_id: int,
        stop_ids: Sequence[int] = (),
        template: str = "",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self.backend, self._lock = backend, threading.Lock()
        self.prefix_ids, self.end_id = tuple(prefix_ids), end_id
        self.stop_ids = tuple(dict.fromkeys((end_id, *stop_ids)))
        self.has_chat_template = bool(template)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        added = backend.get_added_tokens_decoder().values()
        self.special_texts = tuple(t.content for t in added if t.special)
        parts = [backend.to_str(), self.prefix_ids, self.end_id, template]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def encode(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Ids of each text, without prefix or end. Raises DataError for half surrogate pairs."""
        with self._lock:
            self.backend.encode_special_tokens = not markup
            try:
                encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            except TypeError:
                _refuse_surrogates(texts)
                raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """Raises ModelError: there is no template. Tokenizers with one override this."""
        raise ModelError("the tokenizer has no chat template")


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise DataError(
                    f"text {number}: character {e.start} ({text[e.start]!a}) is half of a surrogate pair, which is no "
                    "Unicode text and cannot be tokenised; replace it"
                ) from e
