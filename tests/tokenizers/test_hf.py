"""Real tokenizers through the hf component, against transformers itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_tokenizers.hf import Hf, HfTokenizer

from nanovllm_core.contracts import ModelRef
from nanovllm_core.errors import DataError, ModelError
from nanovllm_core.hooks import verify

ASSETS = os.environ.get("NANOVLLM_ASSETS")
needs_assets = pytest.mark.skipif(
    not ASSETS, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<|im_", "user\n"]
TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(SPECIAL)).map("".join)
NAMES = ["smollm2-135m", "qwen3-tokenizer"]

_pairs: dict[str, tuple[HfTokenizer, Any]] = {}


def pair(name: str) -> tuple[HfTokenizer, Any]:
    """Ours and transformers' own, opened once."""
    if name not in _pairs:
        from transformers import AutoTokenizer

        folder = str(Path(ASSETS or "") / name)
        ours = Hf(path=ModelRef(folder)).make(list, 0)
        assert isinstance(ours, HfTokenizer)
        _pairs[name] = (ours, AutoTokenizer.from_pretrained(folder))
    return _pairs[name]


def test_component_follows_its_spec() -> None:
    assert verify("tokenizers", Hf) is None


@needs_assets
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_ids_are_those_of_transformers(name: str, text: str) -> None:
    ours, theirs = pair(name)
    assert [*ours.prefix_ids, *ours.encode([text], markup=True)[0]] == theirs(text)["input_ids"]
    [plain] = ours.encode([text])
    assert plain == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(plain) & set(theirs.all_special_ids)
    assert ours.decode(plain) == theirs.decode(plain)
    if name == "smollm2-135m" and text.isascii() and text.isprintable():  # some bytes are not in its vocabulary
        assert ours.decode(plain) == text


@needs_assets
@pytest.mark.parametrize(("name", "end", "size"), [("smollm2-135m", 2, 49152), ("qwen3-tokenizer", 151645, 151669)])
def test_outline(name: str, end: int, size: int) -> None:
    ours, theirs = pair(name)
    assert (ours.end_id, ours.vocab_size, ours.prefix_ids, ours.has_chat_template) == (end, size, (), True)
    assert end in ours.stop_ids
    assert {"<|im_start|>", "<|im_end|>"} <= set(ours.special_texts)
    assert "<think>" not in ours.special_texts
    decision = Hf(path=ModelRef(theirs.name_or_path)).vocab_size(10)
    assert decision.value == size
    assert name in decision.why


@needs_assets
@pytest.mark.parametrize("name", NAMES)
def test_chat_is_the_template(name: str) -> None:
    ours, theirs = pair(name)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for n, answer_next in ((1, True), (2, False)):
        text = ours.chat(messages[:n], answer_next=answer_next)
        assert text == theirs.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=answer_next)
        ids = theirs.apply_chat_template(messages[:n], add_generation_prompt=answer_next, return_dict=False)
        assert ours.encode([text], markup=True)[0] == ids


@needs_assets
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_opened_again_is_the_same(name: str, tmp_path: Path) -> None:
    ours, _ = pair(name)
    ours.save(tmp_path)
    again = Hf(path=ModelRef(str(tmp_path))).make(list, 0)
    texts = ["Hello <|im_end|> wörld\n\n 12345", "日本語 e\u0301 <think>"]
    for markup in (False, True):
        assert again.encode(texts, markup=markup) == ours.encode(texts, markup=markup)
    assert (again.prefix_ids, again.end_id, again.vocab_size) == (ours.prefix_ids, ours.end_id, ours.vocab_size)
    messages = [{"role": "user", "content": "Hi"}]
    assert again.chat(messages, answer_next=True) == ours.chat(messages, answer_next=True)


@needs_assets
def test_generation_config_adds_stop_ids_and_the_template_counts_in_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(Path(ASSETS or "") / "qwen3-tokenizer", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    ours = Hf(path=ModelRef(str(folder))).make(list, 0)
    assert ours.stop_ids == (151645, 151643)
    assert ours.fingerprint == pair("qwen3-tokenizer")[0].fingerprint
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only questions') }}")
    other = Hf(path=ModelRef(str(folder))).make(list, 0)
    assert other.fingerprint != ours.fingerprint
    with pytest.raises(ModelError, match=r"refuses the conversation .*only questions"):
        other.chat([{"role": "user", "content": "x"}], answer_next=True)


def small(folder: Path, *, eos: str | None = "</s>", bos: bool = True) -> Path:
    """A folder with a word-level tokenizer that opens texts with <s>, as Llama's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "Hello": 4, "world": 5}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    if bos:
        special = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_prefix_is_found_and_a_closing_token_is_not_in_it(tmp_path: Path) -> None:
    ours = Hf(path=ModelRef(str(small(tmp_path / "a")))).make(list, 0)
    assert (ours.prefix_ids, ours.end_id, ours.has_chat_template) == ((0,), 1, False)
    bare = Hf(path=ModelRef(str(small(tmp_path / "b", bos=False)))).make(list, 0)
    assert bare.prefix_ids == ()
    with pytest.raises(ModelError, match="no chat template"):
        ours.chat([], answer_next=True)


def test_unusable_folders_say_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no end token"):
        Hf(path=ModelRef(str(small(tmp_path / "a", eos=None)))).vocab_size(0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="no tokenizer that transformers can open"):
        Hf(path=ModelRef(str(empty))).vocab_size(0)
    broken = small(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer that transformers can open"):
        Hf(path=ModelRef(str(broken))).vocab_size(0)
    with pytest.raises(ModelError, match="no such folder"):
        Hf(path=ModelRef("./nowhere/at/all")).vocab_size(0)


def test_half_surrogates_are_refused(tmp_path: Path) -> None:
    ours = Hf(path=ModelRef(str(small(tmp_path / "a")))).make(list, 0)
    with pytest.raises(DataError, match="half of a surrogate pair"):
        ours.encode(["\udc80"])
