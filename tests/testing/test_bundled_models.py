"""Bundled models keep their contract; pretrained ones from small random folders."""

from __future__ import annotations

from typing import Any

import pytest
from nanovllm_models.any_architecture import Transformers
from nanovllm_models.preset import Preset
from nanovllm_models.pretrained import Pretrained

from nanovllm_core.contracts import ModelRef
from nanovllm_core.testing import ModelContract

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


class TestPreset(ModelContract):
    component = Preset(size="tiny")


class TestUntiedLlamaPreset(ModelContract):
    component = Preset(size="tiny", family="llama", tied=False, kv_heads=1, intermediate=100)
    vocab_size = 61


@pytest.fixture(scope="class")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A random transformers model of the class's family and options, saved, as its component."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {} if request.cls.family in ("gpt2", "gpt_neox") else SIZES
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(request.cls.family, **sizes, **request.cls.options)
    )
    path = tmp_path_factory.mktemp(request.cls.family)
    model.save_pretrained(path)
    use = Transformers if request.cls.family == "gpt_neox" else Pretrained
    request.cls.component = use(path=ModelRef(str(path)))


@pytest.mark.usefixtures("folder")
class TestPretrainedQwen3(ModelContract):
    family = "qwen3"
    options = {"tie_word_embeddings": True}


@pytest.mark.usefixtures("folder")
class TestPretrainedLlama(ModelContract):
    family = "llama"
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}


@pytest.mark.usefixtures("folder")
class TestPretrainedQwen2(ModelContract):
    family = "qwen2"
    options = {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.usefixtures("folder")
class TestPretrainedMistral(ModelContract):
    family = "mistral"
    options = {"tie_word_embeddings": False, "sliding_window": 4}


@pytest.mark.usefixtures("folder")
class TestPretrainedGPT2(ModelContract):
    family = "gpt2"
    options = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.usefixtures("folder")
class TestAnotherArchitecture(ModelContract):
    family = "gpt_neox"
    options = {
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
