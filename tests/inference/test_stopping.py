"""Stop texts are found at the token that completes them, however tokens cut characters."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_tokenizers.bpe import train

from nanovllm_core.inference.stopping import GrowingText, StopTexts


class Bytes:
    """Each byte a token: every character beyond ASCII is cut."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Folder:
    """A real tokenizer's file."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)


class Spaced:
    """A decoder that drops the first space, so that a token's text depends on whether something precedes it."""

    TOKENS = ("\u2581a", "\u2581b", "a", "b", "\u2581")

    def __init__(self) -> None:
        from tokenizers import Tokenizer, decoders, models

        self.inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(self.TOKENS)}))
        self.inner.decoder = decoders.Metaspace(prepend_scheme="always")

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def by_definition(tokenizer, ids: list[int], stops: list[str]) -> tuple[str, int] | None:
    """The first prefix of the ids whose text holds a stop text: the text before it, and the prefix's length."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        ends = [text.find(s) for s in stops if s in text]
        if ends:
            return text[: min(ends)], n
    return None


def one_by_one(tokenizer, ids: list[int], stops: list[str]) -> tuple[str, int] | None:
    watch = StopTexts(tokenizer, stops)
    for n in range(1, len(ids) + 1):
        text = watch.found(ids[:n])
        if text is not None:
            return text, n
    return None


SPACED = Spaced()
characters = st.sampled_from("ab é€\U0001f600\n")
stop_texts = st.lists(st.text(characters, min_size=1, max_size=4), max_size=3)


@given(st.text(characters, max_size=30), stop_texts)
@settings(max_examples=500)
def test_bytes(text: str, stops: list[str]) -> None:
    ids = list(text.encode())
    assert one_by_one(Bytes(), ids, stops) == by_definition(Bytes(), ids, stops)


@given(st.binary(max_size=30), stop_texts)
@settings(max_examples=500)
def test_broken_bytes(raw: bytes, stops: list[str]) -> None:
    raw += "".join(stops).encode()
    assert one_by_one(Bytes(), list(raw), stops) == by_definition(Bytes(), list(raw), stops)


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=2))
@settings(max_examples=500)
def test_a_decoder_that_looks_at_what_precedes(ids: list[int], stops: list[str]) -> None:
    assert one_by_one(SPACED, ids, stops) == by_definition(SPACED, ids, stops)


@pytest.mark.skipif(
    "NANOVLLM_ASSETS" not in os.environ, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)"
)
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-tokenizer"])
def test_real_tokenizers(name: str) -> None:
    tokenizer = Folder(Path(os.environ["NANOVLLM_ASSETS"]) / name)

    @given(
        st.text(st.sampled_from("ab é€\U0001f600\n漢.,'") | st.characters(exclude_categories=("Cs",)), max_size=40),
        stop_texts,
    )
    @settings(max_examples=150, deadline=None)
    def check(text: str, stops: list[str]) -> None:
        ids = tokenizer.encode(text)
        assert one_by_one(tokenizer, ids, stops) == by_definition(tokenizer, ids, stops)

    check()
    ids = tokenizer.encode("The end. User: who? \U0001f9d1\u200d\U0001f680 then more")
    assert one_by_one(tokenizer, ids, ["\nUser", "er: w"])[0] == "The end. Us"
    assert one_by_one(tokenizer, ids, ["\u200d\U0001f680 t"])[0] == "The end. User: who? \U0001f9d1"


def test_text_that_stays_unfinished_is_let_go() -> None:
    """Lone bytes of characters, and tokens without a text: each token is decoded a few times, not all again."""
    tokenizer = train(["ä" * 9], 300)
    lone = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd")
    silent = tokenizer.end_id
    assert tokenizer.decode([silent]) == ""
    for ids in ([lone] * 100, [silent] * 100, [lone, silent] * 50):
        growing = GrowingText(tokenizer)
        for count in range(1, 101):
            growing.grow(ids[:count])
            assert count - growing.start <= 20
        assert growing.text == tokenizer.decode(ids)[: len(growing.text)]


def test_a_character_after_bytes_that_are_no_text_is_whole() -> None:
    growing, raw = GrowingText(Bytes()), list(b"\x80" * 40 + "😀".encode() + b"\xf0\x9f" + "漢".encode())
    for end in range(1, len(raw) + 1):
        text = growing.grow(raw[:end])
        assert text == bytes(raw[:end]).decode("utf-8", "replace")
    assert growing.start > 30


def test_tokens_without_a_text_stand_within_no_character() -> None:
    class Silent(Bytes):
        def decode(self, ids):
            return super().decode([i for i in ids if i < 256])

    growing, ids = GrowingText(Silent()), [*b"\xe2\x9f" * 6, 0xE2, 0x9F, 999, 999, 999, 0x82, 65]
    for end in range(1, len(ids) + 1):
        text = growing.grow(ids[:end])
    assert text == Silent().decode(ids)


def test_several_tokens_at_once_are_as_one_by_one() -> None:
    """A consumer that is slow sees some at once, the last of them in the midst of a character."""
    tokenizer = train(["漢字 und 😀, Zoë"] * 9, 270)
    ids = tokenizer.encode(["abc 漢字漢字😀😀 Zoë " * 4])[0]
    pick = random.Random(2)
    for _ in range(50):
        one, some, at = GrowingText(tokenizer), GrowingText(tokenizer), 0
        while at < len(ids):
            step = pick.randint(1, 14)
            for end in range(at + 1, min(at + step, len(ids)) + 1):
                one.grow(ids[:end])
            at = min(at + step, len(ids))
            some.grow(ids[:at])
            assert some.text == one.text
        assert some.grow(ids) == tokenizer.decode(ids)
