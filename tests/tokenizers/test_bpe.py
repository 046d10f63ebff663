"""The trained vocabulary: nothing is lost, its size is kept, transformers opens it, text cannot name special tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_tokenizers.bpe import CUT, END, PAD, PIECE, SPLIT, Bpe, BpeTokenizer, pieces, train
from nanovllm_tokenizers.hf import load

from nanovllm_core.errors import DataError, OptionError
from nanovllm_core.hooks import verify

TOPICS = [topics[k] for k in sorted(topics)][:40]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
SPICES = [END, PAD, "<|reserved_0|>", "<|", "\r\n", " \n ", "é", "e\u0301"]
SPICED = st.lists(UNICODE | st.sampled_from(SPICES)).map("".join)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train(TOPICS, 1024)


@pytest.fixture(scope="module")
def opened(bpe: BpeTokenizer, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bpe")
    bpe.save(folder)
    return AutoTokenizer.from_pretrained(str(folder))


def test_component_follows_its_spec() -> None:
    assert verify("tokenizers", Bpe) is None
    for wrong in (257, 1_000_001):
        with pytest.raises(ValueError, match="between 258"):
            Bpe(size=wrong)


@pytest.mark.parametrize(
    ("data_bytes", "size"),
    [
        (0, 512),
        (1, 512),
        (65_535, 512),
        (65_536, 1024),
        (465_000, 2048),
        (1_215_186, 4096),
        (67_108_863, 16384),
        (67_108_864, 32768),
        (10**12, 32768),
    ],
)
def test_size_is_chosen_from_the_data_with_a_reason(data_bytes: int, size: int) -> None:
    decision = Bpe().vocab_size(data_bytes)
    assert decision.value == size
    assert f"{data_bytes:,} bytes" in decision.why
    assert Bpe(size=1000).vocab_size(data_bytes).value == 1000


@settings(max_examples=300, deadline=None)
@given(UNICODE | SPICED)
def test_every_text_round_trips(bpe: BpeTokenizer, text: str) -> None:
    [ids] = bpe.encode([text])
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(ids) == text.encode("utf-8")


@settings(max_examples=300, deadline=None)
@given(st.binary() | UNICODE.map(lambda t: t.encode("utf-16-le")) | UNICODE.map(lambda t: t.encode()[:-1]))
def test_every_byte_string_round_trips(bpe: BpeTokenizer, data: bytes) -> None:
    ids = bpe.encode_bytes(data)
    assert bpe.decode_bytes(ids) == data
    assert all(0 <= i < bpe.vocab_size for i in ids)
    assert bpe.decode(ids) == data.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(SPICED)
def test_text_never_becomes_a_special_token(bpe: BpeTokenizer, text: str) -> None:
    special = {bpe.end_id, 1}
    assert not special & set(bpe.encode([text])[0])
    assert bpe.end_id in bpe.encode([text + END], markup=True)[0]
    assert bpe.encode([PAD], markup=True) == [[1]]


@settings(max_examples=200, deadline=None)
@given(SPICED)
def test_transformers_gives_the_same_ids(bpe: BpeTokenizer, opened, text: str) -> None:
    assert tuple(opened(text)["input_ids"]) == (*bpe.prefix_ids, *bpe.encode([text], markup=True)[0])
    assert opened(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == bpe.encode([text])[0]
    assert opened.decode(bpe.encode([text])[0]) == text


def test_what_transformers_opens_knows_its_special_tokens(bpe: BpeTokenizer, opened) -> None:
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 0, 1)
    assert len(opened) == bpe.vocab_size == 1024
    assert bpe.prefix_ids == (bpe.end_id,) == (0,)
    assert bpe.stop_ids == (0,)


def test_the_saved_folder_is_the_same_tokenizer(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    again = load(str(tmp_path))
    assert again.fingerprint == bpe.fingerprint
    assert (again.prefix_ids, again.end_id, again.vocab_size) == (bpe.prefix_ids, bpe.end_id, bpe.vocab_size)
    assert again.encode(TOPICS) == bpe.encode(TOPICS)


@pytest.mark.parametrize("size", [258, 259, 300, 600, 5000])
def test_the_planned_size_is_kept(size: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small = train(["to be or not to be, that is the question: to be"] * 2, size)
    assert small.vocab_size == size
    assert sorted(small.backend.get_vocab().values()) == list(range(size))
    small.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(opened) == size
    [ids] = small.encode(["to be <|reserved_1|> ☃"])
    assert opened("to be ☃")["input_ids"] == [0, *small.encode(["to be ☃"])[0]]
    assert small.decode(ids) == "to be <|reserved_1|> ☃"


def test_training_reads_special_words_as_text() -> None:
    noisy = train([f"{END} {END} hello hello {PAD}"] * 50, 400)
    assert noisy.decode(noisy.encode([f"{END}hello"])[0]) == f"{END}hello"
    assert not {0, 1} & set(noisy.encode([f"{END}hello{PAD}"])[0])


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "Zoë", "'s", " ", "  ", "\n", "\r\n", "\t", ".", "—", "12", "漢字", "\u0301", "\u2028"])
    )
)
def test_long_texts_are_cut_between_words(parts: list[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    def words(text: str) -> list[str]:
        return [w for w, _ in pre_tokenizers.Split(Regex(SPLIT), behavior="isolated").pre_tokenize_str(text)]

    text = "".join(parts)
    if place := CUT.match(text):
        assert words(text[: place.end()]) + words(text[place.end() :]) == words(text)
    cut = list(pieces([text], 12))
    assert "".join(cut) == text
    assert all(len(piece) <= 12 for piece in cut)


def test_a_long_document_gives_the_same_vocabulary_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(TOPICS)
    assert len(text) > 2 * PIECE
    wanted = train([text], 600).fingerprint
    for most in (1000, 10**9):
        monkeypatch.setattr("nanovllm_tokenizers.bpe.PIECE", most)
        assert train([text], 600).fingerprint == wanted


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 258"):
        train(["x"], 257)


def test_half_surrogates_are_refused(bpe: BpeTokenizer) -> None:
    with pytest.raises(DataError, match=r"text 1: character 2 \('\\ud800'\)"):
        bpe.encode(["fine", "ab\ud800"])


def test_the_same_texts_give_the_same_vocabulary_in_any_process(bpe: BpeTokenizer) -> None:
    code = (
        "from pydoc_data.topics import topics; from nanovllm_tokenizers.bpe import train;"
        "print(train([topics[k] for k in sorted(topics)][:40], 1024).fingerprint)"
    )
    paths = json.dumps(sys.path)
    for threads in ("true", "false"):
        out = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:] = {paths}; {code}"],
            env={"TOKENIZERS_PARALLELISM": threads, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == bpe.fingerprint


def test_a_word_keeps_its_space_and_numbers_are_short(bpe: BpeTokenizer) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    words = [w for w, _ in split.pre_tokenize_str("Don't  stop: 123456 हिन्दी\n\n  x = y")]
    assert words == ["Don", "'t", " ", " stop", ":", " ", "123", "456", " हिन्दी", "\n\n", " ", " x", " =", " y"]


def test_what_was_kept_is_opened_instead_of_made_again(tmp_path: Path) -> None:
    def never() -> list[str]:
        raise AssertionError("the texts are read again")

    component = Bpe(size=400)
    made = component.make(lambda: ["some words and some more words " * 9], 400, tmp_path)
    again = component.make(never, 400, tmp_path)
    assert again.fingerprint == made.fingerprint
    assert again.encode(["more words <|pad|>"]) == made.encode(["more words <|pad|>"])
    assert (again.prefix_ids, again.end_id, again.vocab_size) == (made.prefix_ids, made.end_id, 400)
    assert component.make(lambda: ["other words"], 400, None).fingerprint != made.fingerprint
