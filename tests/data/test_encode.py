"""Documents as ids and marks: plain, framed by chat templates, cut when long, and never a special token from text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_core.contracts import Document, Segment
from nanovllm_core.data import encode as encode_module
from nanovllm_core.data.encode import Encoder
from nanovllm_core.errors import DataError, ModelError

ASSETS = os.environ.get("NANOVLLM_ASSETS")
needs_assets = pytest.mark.skipif(
    not ASSETS, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)"
)
NAMES = ["smollm2-135m", "qwen3-tokenizer"]
SPICES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_<|im_end|>", "assistant\n", "\ue0a5", "\ue0a60\ue0a5"]
TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(SPICES), min_size=1)
_opened: dict[str, object] = {}


def plain(*texts: tuple[str, bool]) -> Document:
    return Document(segments=tuple(Segment(t, trained=m) for t, m in texts), source="a.txt", index=5)


def dialogue(*turns: str) -> Document:
    roles = ("user", "assistant")
    segments = tuple(Segment(t, trained=bool(i % 2), role=roles[i % 2]) for i, t in enumerate(turns))
    return Document(segments=segments, source="a.jsonl", index=5)


def real(name: str):
    from nanovllm_tokenizers.hf import load

    if name not in _opened:
        _opened[name] = load(str(Path(ASSETS or "") / name))
    return _opened[name]


def ids(text: str) -> list[int]:
    return [4 + ord(c) for c in text]


def test_plain_documents(letters) -> None:
    encoder = Encoder(letters())
    one, two, three = encoder.encode(
        [plain(("ab", True)), plain(("Q", False), ("é", True)), plain(("a", True), ("b", True), ("c", False))]
    )
    assert (one.ids.tolist(), one.trained.tolist(), one.bytes) == ([0, *ids("ab"), 1], [0, 1, 1, 1], 2)
    assert (two.ids.tolist(), two.trained.tolist(), two.bytes) == ([0, *ids("Q\né"), 1], [0, 0, 0, 1, 1], 2)
    assert (three.ids.tolist(), three.trained.tolist()) == ([0, *ids("a\nb\nc"), 1], [0, 1, 1, 1, 1, 0, 1])


def test_without_a_begin_token_the_first_is_not_predicted_and_its_bytes_do_not_count(letters) -> None:
    encoder = Encoder(letters(prefix=False))
    one, two = encoder.encode([plain(("éab", True)), plain(("Q", False), ("é", True))])
    assert (one.ids.tolist(), one.trained.tolist(), one.bytes) == ([*ids("éab"), 1], [0, 1, 1, 1], 2)
    assert (two.trained.tolist(), two.bytes) == ([0, 0, 1, 1], 2)


def test_roles_without_a_template_are_joined_by_a_newline(letters) -> None:
    [one] = Encoder(letters()).encode([dialogue("Q", "A")])
    assert one.ids.tolist() == [0, *ids("Q\nA"), 1]


def test_chat_trains_the_answer_and_its_end(letters) -> None:
    tokenizer = letters(template=True)
    [one] = Encoder(tokenizer).encode([dialogue("Q", "Aé")])
    [whole] = tokenizer.encode(["<u>u:Q<e>\n<u>a:Aé<e>"], markup=True)
    assert one.ids.tolist() == [0, *whole]  # what follows the end token is cut
    assert one.trained.tolist() == [0] * (len(one.ids) - 3) + [1, 1, 1]
    assert one.bytes == 3


def test_chat_of_several_turns_trains_each_answer(letters) -> None:
    tokenizer = letters(template=True)
    [one] = Encoder(tokenizer).encode([dialogue("Q", "A", "R", "B", "left out")])
    [whole] = tokenizer.encode(["<u>u:Q<e>\n<u>a:A<e>\n<u>u:R<e>\n<u>a:B<e>"], markup=True)
    assert one.ids.tolist() == [0, *whole]
    assert tokenizer.decode(one.ids[one.trained > 0].tolist()) == "AB"
    assert (int(one.trained.sum()), one.bytes) == (4, 2)


def test_special_words_in_a_message_stay_text(letters) -> None:
    tokenizer = letters(template=True)
    [one] = Encoder(tokenizer).encode([dialogue("<e>\n<u>a:<e><b>", "x<e>y<<u>e>")])
    found = [i for i in one.ids.tolist() if i < 3]
    assert found == [0, 2, 1, 2, 1]  # prefix, then the template's own
    assert tokenizer.decode(one.ids[one.trained > 0].tolist()) == "x<e>y<<u>e>"


def test_templates_that_cannot_frame_say_how_to_go_on(letters) -> None:
    class Counting(letters):  # type: ignore[misc, valid-type]
        def chat(self, messages, *, answer_next):
            return f"{len(messages)}" + super().chat(messages, answer_next=answer_next)

    class Refusing(letters):  # type: ignore[misc, valid-type]
        def chat(self, messages, *, answer_next):
            raise ModelError("template refuses")

    for kind in (Counting, Refusing):
        with pytest.raises(DataError, match=r"^a\.jsonl\[5\]: .*`chat: false`"):
            Encoder(kind(template=True)).encode([dialogue("Q", "A")])


def test_an_answer_without_an_end_gets_one(letters) -> None:
    class Open(letters):  # type: ignore[misc, valid-type]
        def chat(self, messages, *, answer_next):
            return super().chat(messages, answer_next=answer_next).replace("<e>", "|")

    [one] = Encoder(Open(template=True)).encode([dialogue("Q", "A")])
    assert one.ids.tolist()[-4:] == [*ids("A|\n"), 1]
    assert one.trained.tolist()[-5:] == [0, 1, 1, 1, 1]


@needs_assets
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT.map("".join), answer=TEXT.map("".join))
def test_real_templates_never_take_special_tokens_from_text(name: str, prompt: str, answer: str) -> None:
    tokenizer = real(name)
    special = {tokenizer.encode([t], markup=True)[0][0] for t in tokenizer.special_texts}
    harmless, spiced = Encoder(tokenizer).encode([dialogue("Hello", "World"), dialogue(prompt, answer)])
    assert [i for i in spiced.ids.tolist() if i in special] == [i for i in harmless.ids.tolist() if i in special]
    assert (int(spiced.ids[-1]), int(spiced.trained[-1])) == (tokenizer.end_id, 1)
    first = int(np.flatnonzero(spiced.trained)[0])
    assert np.all(spiced.trained[first:] == 1)


@needs_assets
@pytest.mark.parametrize("name", NAMES)
def test_real_templates_frame_as_transformers_does(name: str) -> None:
    tokenizer = real(name)
    [one] = Encoder(tokenizer).encode([dialogue("What is 2+2?", "It is 4.\nTruly.")])
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4.\nTruly."}]
    theirs = tokenizer.opened.apply_chat_template(messages, return_dict=False)
    assert one.ids.tolist() == theirs[: len(one.ids)]
    assert tokenizer.opened.decode(theirs[len(one.ids) :]).strip() == ""
    start = tokenizer.opened.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert one.trained.tolist() == [0] * len(start) + [1] * (len(one.ids) - len(start))


@needs_assets
@pytest.mark.parametrize("name", [*NAMES, "bpe"])
def test_long_texts_are_cut_without_changing_an_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(ASSETS or "") / "debian-handbook"
    text = "\n\n".join(p.read_text("utf-8") for p in sorted(folder.rglob("*.txt"))[:40])
    if name == "bpe":
        from nanovllm_tokenizers.bpe import train

        tokenizer = train([text], 2048)
    else:
        tokenizer = real(name)
    [whole] = Encoder(tokenizer).encode([plain((text, True))])
    monkeypatch.setattr(encode_module, "LONG", 700)
    encoder = Encoder(tokenizer)
    assert len(encoder._parts(text)) > len(text) / 1500
    [cut] = encoder.encode([plain((text, True))])
    assert np.array_equal(whole.ids, cut.ids)
    assert whole.bytes == cut.bytes


def test_texts_that_cannot_be_cut_stay_whole(monkeypatch: pytest.MonkeyPatch, letters) -> None:
    class Led(letters):  # type: ignore[misc, valid-type]
        def _ids(self, text: str, markup: bool) -> list[int]:
            return [3, *super()._ids(text, markup)]  # as tokenizers do that begin every text with a space sign

    monkeypatch.setattr(encode_module, "LONG", 10)
    text = "some words here and there " * 5
    assert Encoder(Led())._parts(text) == [text]
    assert Encoder(letters())._parts("x" * 100) == ["x" * 100]
    assert "".join(Encoder(letters())._parts(text)) == text
    assert len(Encoder(letters())._parts(text)) > 5


def test_the_tokenizer_is_given_bounded_groups(monkeypatch: pytest.MonkeyPatch, letters) -> None:
    monkeypatch.setattr(encode_module, "GROUP", 100)
    monkeypatch.setattr(encode_module, "LONG", 50)
    tokenizer = letters()
    Encoder(tokenizer).encode([plain(("word " * 400, True)), *[plain(("tiny", True))] * 50])
    assert max(tokenizer.calls) <= 2 * encode_module.CONTEXT * 2 + 200
