"""A byte-level BPE vocabulary made from the documents: no text is unknown, nothing is normalised away.

Ids: `<|endoftext|>` (0, begins and ends a document), `<|pad|>` (1), the 256 bytes, then merges by frequency. Where the
documents have too few pairs that occur twice, `<|reserved_N|>` fill up, so that the vocabulary has the planned size and
the model's embedding its planned rows. Trains at 4-6 MB/s: words are counted while the texts are read, merges follow
when the last one has been. The same texts give the same vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from nanovllm_core.contracts import Decision, Tokenizer
from nanovllm_core.errors import OptionError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.options import between
from nanovllm_tokenizers.fast import FastTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILE = "tokenizer.json"
END, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST = 258  # 256 bytes, END, PAD
AUTO = (512, 32768)  # bounds of a size chosen from the data
# Words with the space or sign before them, contractions, up to 3 digits, runs of signs, line ends, other white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 1 << 16  # characters; the trainer takes 256 texts at a time, however long
# The last place where no match of SPLIT goes across: after a line end, or before a lone space.
CUT = re.compile(r".*(?:\n(?=\S)|\S(?= \S))", re.DOTALL)


@frozen(kw_only=True, eq=False)
class Bpe:
    """A byte-level BPE vocabulary trained on the documents.

    size: ids in the vocabulary; null chooses a power of two by the amount of text
    """

    size: int | None = field(default=None, validator=between(SMALLEST, 1_000_000))

    @hookimpl
    def vocab_size(self, data_bytes: int) -> Decision:
        """The size asked for, or the largest power of two up to 4 * sqrt(data_bytes), between 512 and 32,768."""
        if self.size is not None:
            return Decision(self.size, "the recipe says so")
        low, high = AUTO
        wanted = 4 * math.sqrt(data_bytes)
        power = 1 << max(0, math.floor(math.log2(wanted))) if wanted >= 1 else 1
        size = min(max(power, low), high)
        bound = "" if size == power else f", and at {'least' if size == low else 'most'} {size:,}"
        return Decision(size, f"the largest power of two up to 4 x sqrt of {data_bytes:,} bytes ({wanted:,.0f}){bound}")

    @hookimpl
    def make(self, texts: Callable[[], Iterable[str]], vocab_size: int, kept: Path | None) -> Tokenizer:
        """What was kept, or a vocabulary trained on the texts. The result has exactly `vocab_size` ids."""
        if kept and (file := kept / FILE).is_file():
            from tokenizers import Tokenizer as Backend

            return _tokenizer(Backend.from_file(str(file)))
        made = train(texts(), vocab_size)
        if kept:
            made.save(kept)
        return made


def train(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """A vocabulary of exactly `vocab_size` ids. Raises OptionError below 258."""
    if vocab_size < SMALLEST:
        raise OptionError(f"tokenizer.size: got {vocab_size}, at least {SMALLEST} (256 bytes and two special tokens)")
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (END, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces(texts, PIECE), trainer)
    missing = vocab_size - backend.get_vocab_size()
    reserved = [f"<|reserved_{i}|>" for i in range(missing)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in reserved])
    end = backend.token_to_id(END)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end)]
    )
    return _tokenizer(backend)


def _tokenizer(backend: Backend) -> BpeTokenizer:
    end = backend.token_to_id(END)
    return BpeTokenizer(backend, prefix_ids=(end,), end_id=end)


def pieces(texts: Iterable[str], most: int) -> Iterator[str]:
    """The texts, those of more than `most` characters in parts cut between words (anywhere, if a word is longer)."""
    for text in texts:
        start = 0
        while len(text) - start > most:
            found = CUT.match(text, start, start + most)
            end = found.end() if found else start + most
            yield text[start:end]
            start = end
        yield text[start:]


class BpeTokenizer(FastTokenizer):
    """What `train` gives: also encodes any bytes, valid UTF-8 or not."""

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: text where they are UTF-8, single-byte tokens where they are not."""
        parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
        texts = iter(self.encode(parts[::2]))
        ids: list[int] = []
        for number, part in enumerate(parts):
            invalid = number % 2
            ids += [self._of_byte[b] for b in part.encode("utf-8", "surrogateescape")] if invalid else next(texts)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of ids; special tokens are none."""
        return b"".join(self._bytes[i] for i in ids)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        }
        with self._lock:
            self.backend.encode_special_tokens = False
            (folder / FILE).write_text(self.backend.to_str(pretty=True), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @cached_property
    def _of_byte(self) -> list[int]:
        return [self.backend.token_to_id(c) for c in _alphabet()]

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each id."""
        byte = {c: b for b, c in enumerate(_alphabet())}
        special = set(self.special_texts)
        table = [b""] * self.vocab_size
        for token, number in self.backend.get_vocab(with_added_tokens=True).items():
            table[number] = b"" if token in special else bytes(byte[c] for c in token)
        return table


def _alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it shows, else U+0100 and on."""
    shows = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(b) if b in shows else chr(next(hidden)) for b in range(256)]
