"""The tokenizer, by nano-vllm's conformance kit; then what is its own."""

import json

import pytest
from nanovllm_bytes.component import END_ID, PAD_ID, Bytes

from nanovllm_core.errors import DataError
from nanovllm_core.testing import TokenizerContract


class TestBytes(TokenizerContract):
    component = Bytes()


def made():
    return Bytes().make(lambda: iter(()), 258)


def test_ids_are_the_bytes():
    tokenizer = made()
    assert tokenizer.encode(["aé\x00", ""]) == [[97, 0xC3, 0xA9, 0], []]
    assert tokenizer.encode(["a<|endoftext|>b<|pad|>"], markup=True) == [[97, END_ID, 98, PAD_ID]]
    assert tokenizer.decode([97, END_ID, 0xC3]) == "a\ufffd"


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(DataError, match="character 1"):
        made().encode(["a\ud800"])


def test_the_saved_folder_gives_any_byte_the_same_id(tmp_path):
    made().save(tmp_path)
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(chr(i) for i in range(0x800)) + "\u20ac\U0001f600"  # every byte that UTF-8 uses
    assert backend.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert backend.encode("a").ids == [END_ID, 97]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
