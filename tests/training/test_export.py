"""The ids of begin and end in an exported folder are those of the tokenizer beside them."""

import json
import os
from pathlib import Path

import pytest
from nanovllm_tokenizers.bpe import train
from nanovllm_tokenizers.hf import load

from nanovllm_core.training.export import write_config

BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 600, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "bos_token_id": 1, "eos_token_id": [2, 599], "pad_token_id": 599,
}  # fmt: skip


def opened(folder):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    return (f.from_pretrained(folder) for f in (AutoConfig, GenerationConfig, AutoTokenizer))


def test_a_new_vocabulary_over_a_pretrained_model_brings_its_own_ids(tmp_path):
    tokenizer = train(["to be or not to be, that is the question"], 300)
    write_config(tmp_path, BASE, tokenizer, "float32")
    config, generation, theirs = opened(tmp_path)
    for ids in (config, generation, theirs):
        assert (ids.bos_token_id, ids.eos_token_id) == (tokenizer.end_id, tokenizer.end_id) == (0, 0)
    assert config.pad_token_id is None
    assert BASE["pad_token_id"] == 599
    write_config(tmp_path, {**BASE, "pad_token_id": 1}, tokenizer, "float32")
    assert next(opened(tmp_path)).pad_token_id == 1


@pytest.mark.skipif(
    "NANOVLLM_ASSETS" not in os.environ, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)"
)
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-tokenizer"])
def test_a_tokenizer_that_begins_with_nothing_leaves_no_begin_id(name, tmp_path):
    tokenizer = load(str(Path(os.environ["NANOVLLM_ASSETS"], name)))
    assert tokenizer.prefix_ids == ()
    write_config(tmp_path, BASE, tokenizer, "float32")
    config, generation, theirs = opened(tmp_path)
    assert config.bos_token_id is None  # 1, if the key were left out
    assert generation.bos_token_id is None
    assert config.eos_token_id == theirs.eos_token_id == tokenizer.end_id
    stops = generation.eos_token_id
    assert (stops if isinstance(stops, list) else [stops]) == list(tokenizer.stop_ids)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
