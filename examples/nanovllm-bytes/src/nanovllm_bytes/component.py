"""The `bytes` tokenizer: ids 0 to 255 are the bytes of UTF-8, then an end and a pad token.

Nothing is learned from the documents and no text is unknown; in exchange a text has as many ids as bytes, some four
times as many as with a vocabulary of 8,000, so a window of the model holds a quarter of the text. Encoding needs no
table: tens of MB/s in plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from nanovllm_core.contracts import Decision, Tokenizer
from nanovllm_core.errors import DataError, ModelError
from nanovllm_core.hookspecs import hookimpl

END, PAD = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID, SIZE = 256, 257, 258


@frozen(kw_only=True, eq=False)
class Bytes:
    """One id a byte of UTF-8, and an end token: no vocabulary to build."""

    @hookimpl
    def vocab_size(self, data_bytes: int) -> Decision:
        """Always 258."""
        return Decision(SIZE, "256 bytes, an end token, a pad token")

    @hookimpl
    def make(self, texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
        """The tokenizer; the texts are not read."""
        return ByteTokenizer()


class ByteTokenizer:
    """`contracts.Tokenizer` over bytes."""

    vocab_size = SIZE
    prefix_ids: tuple[int, ...] = (END_ID,)
    end_id = END_ID
    stop_ids: tuple[int, ...] = (END_ID,)
    fingerprint = "nanovllm-bytes 1"
    has_chat_template = False
    special_texts: tuple[str, ...] = (END, PAD)

    def encode(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Ids of each text. Raises DataError for half surrogate pairs, which are no text."""
        return [self._marked(text) if markup else list(_utf8(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < END_ID).decode("utf-8", "replace")

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """Raises ModelError: there is no template."""
        raise ModelError("tokenizer bytes: has no chat template")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: to `transformers`, a byte-level BPE without merges."""
        import json

        from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE(vocab={sign: byte for byte, sign in enumerate(_alphabet())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (END, PAD)])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, END_ID)]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({re.escape(END)}|{re.escape(PAD)})", text):
            ids += {END: [END_ID], PAD: [PAD_ID]}.get(part) or _utf8(part)
        return ids


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise DataError(
            f"character {e.start} ({text[e.start]!a}) is half of a surrogate pair, which is no Unicode text; replace it"
        ) from e


def _alphabet() -> list[str]:
    """The sign that stands for each byte in a byte-level vocabulary: itself if it shows, else U+0100 and on."""
    shows = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shows else chr(next(hidden)) for byte in range(256)]
