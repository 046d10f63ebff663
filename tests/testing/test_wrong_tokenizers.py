"""Tokenizers that are wrong in one way each, told by the test that is there for it; bytes as ids are right."""

from __future__ import annotations

import hashlib

import pytest
from attrs import define, field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Decision
from nanovllm_core.errors import ModelError
from nanovllm_core.testing import TokenizerContract, failures


def told(component, why="bytes have no tokenizer.json"):
    """Names of the tests that fail for a component."""

    class Kit(TokenizerContract):
        not_in_transformers = why

    Kit.component = component
    return set(failures(Kit))


@define(eq=False)
class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""

    fingerprint: str = ""
    vocab_size = 257
    prefix_ids = ()
    end_id = 256
    stop_ids = (256,)
    has_chat_template = False
    special_texts = ("<|end|>",)

    def encode(self, texts, *, markup=False):
        return [self.one(text, markup) for text in texts]

    def one(self, text, markup):
        ids = []
        for i, part in enumerate(text.split("<|end|>") if markup else [text]):
            ids += [256] * bool(i) + list(part.encode())
        return ids

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def chat(self, messages, *, answer_next):
        raise ModelError("no template")

    def save(self, folder): ...


@frozen(kw_only=True, eq=False)
class Bytes:
    """Bytes as ids."""

    tokenizer: type = field(default=ByteTokenizer, metadata={"internal": True})

    @hookimpl
    def vocab_size(self, data_bytes):
        return Decision(257, "256 bytes and an end")

    @hookimpl
    def make(self, texts, vocab_size):
        return self.tokenizer(hashlib.sha256(b"bytes").hexdigest())


class LosesBytes(ByteTokenizer):
    def decode(self, ids):
        return bytes(i for i in ids if i < 128).decode()


class Special(ByteTokenizer):
    special_texts = ("<|endoftext|>",)

    def one(self, text, markup):
        return super().one(text.replace("<|endoftext|>", "<|end|>"), True)


class EndIsAByte(ByteTokenizer):
    end_id, stop_ids, special_texts = 0, (0,), ()


class TooMany(ByteTokenizer):
    vocab_size = 300


class OutOfRange(ByteTokenizer):
    end_id, stop_ids, special_texts = 10, (10,), ()

    def one(self, text, markup):
        return [i + 200 for i in super().one(text, markup)]

    def decode(self, ids):
        return super().decode([i - 200 for i in ids if 200 <= i < 456])


class Pads(ByteTokenizer):
    def encode(self, texts, *, markup=False):
        ids = super().encode(texts, markup=markup)
        longest = max(map(len, ids), default=0)
        return [[*i, *[256] * (longest - len(i))] for i in ids]


class PutsAPrefix(ByteTokenizer):
    prefix_ids = (256,)

    def one(self, text, markup):
        return [256, *super().one(text, markup)]


class NeverStops(ByteTokenizer):
    stop_ids = ()


class CutsOff(ByteTokenizer):
    def one(self, text, markup):
        return super().one(text, markup)[:4096]


class RaisesOnHalfACharacter(ByteTokenizer):
    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()


class SpeaksSpecials(ByteTokenizer):
    def decode(self, ids):
        return "".join(super(SpeaksSpecials, self).decode([i]) if i < 128 else "<|end|>" for i in ids)


class StripsParts(ByteTokenizer):
    """Puts a space before every text, and drops it when it decodes."""

    def one(self, text, markup):
        return [32, *super().one(text, markup)] if text else []

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


class SharesABuffer(ByteTokenizer):
    buffer = []

    def one(self, text, markup):
        import time

        self.buffer.clear()
        for i in super().one(text, markup):
            self.buffer.append(i)
            if not len(self.buffer) % 20:
                time.sleep(0)
        time.sleep(0.0001)
        return list(self.buffer)


TOKENIZERS = {
    ByteTokenizer: set(),
    LosesBytes: {"test_decoding_gives_the_text_back", "test_parts_decode_to_the_whole", "test_a_long_text"},
    Special: {"test_a_text_never_becomes_a_special_token"},
    EndIsAByte: {"test_a_text_never_becomes_a_special_token"},
    TooMany: {"test_ids_stay_below_the_planned_size"},
    OutOfRange: {"test_ids_stay_below_the_planned_size"},
    Pads: {"test_a_batch_is_encoded_as_each_text_alone"},
    PutsAPrefix: {"test_empty_text_has_no_ids"},
    NeverStops: {"test_end_stop_and_prefix_ids_agree"},
    CutsOff: {"test_a_long_text"},
    RaisesOnHalfACharacter: {"test_any_ids_decode"},
    SpeaksSpecials: {"test_markup_reads_special_tokens"},
    StripsParts: {"test_parts_decode_to_the_whole"},
    SharesABuffer: {"test_threads_do_not_disturb_each_other"},
}
ALONE = {ByteTokenizer, OutOfRange, EndIsAByte, TooMany, CutsOff, RaisesOnHalfACharacter, NeverStops}


@pytest.mark.parametrize("cls", TOKENIZERS, ids=lambda c: c.__name__)
def test_tokenizers(cls):
    found = told(Bytes(tokenizer=cls))
    assert TOKENIZERS[cls] <= found
    if cls in ALONE:
        assert found == TOKENIZERS[cls]


def test_a_folder_that_transformers_cannot_open():
    assert told(Bytes(), why="") == {"test_saved_folder_opens_in_transformers"}


def test_a_fingerprint_that_says_nothing():
    class Ranked(ByteTokenizer):
        def one(self, text, markup):
            return [(i + self.shift) % 256 if i < 256 else i for i in super().one(text, markup)]

        def decode(self, ids):
            return super().decode([(i - self.shift) % 256 if i < 256 else i for i in ids])

    @frozen(kw_only=True, eq=False)
    class Shifted(Bytes):
        """Bytes, shifted by what was read."""

        @hookimpl
        def make(self, texts, vocab_size):
            made = Ranked("the same for all")
            made.shift = sum(map(len, texts())) % 256
            return made

    found = told(Shifted())
    assert found == {"test_fingerprint_tells_vocabularies_apart"}
