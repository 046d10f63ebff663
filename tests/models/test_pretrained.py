"""Pretrained folders: what is read, what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovllm_models.config import Rope, outline
from nanovllm_models.families import from_huggingface
from nanovllm_models.families.llama import ARCHITECTURES, to_huggingface
from nanovllm_models.pretrained import Pretrained
from safetensors.torch import load_file, save_file

from nanovllm_core.contracts import Accept, Refuse
from nanovllm_core.errors import ModelError

Save = Callable[..., tuple[Any, Path]]
SMALL = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **SMALL}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    kept = {**load_file(file), **tensors}
    save_file({k: v for k, v in kept.items() if v is not None}, file)


def test_weights_and_config_are_the_folder_s(save_transformers: Save) -> None:
    theirs, folder = save_transformers("qwen3", **SMALL, tie_word_embeddings=True)
    theirs.to(torch.bfloat16).save_pretrained(folder)
    model = Pretrained(path=str(folder))
    assert isinstance(model.probe(), Accept)
    assert model.tokenizer() == {"use": "hf", "path": str(folder)}
    shape = model.shape(20)
    assert shape.dtype == "bfloat16"
    assert shape.tied
    assert model.config(shape) == json.loads((folder / "config.json").read_text())
    for name, parameter in theirs.named_parameters():
        assert model.weight(shape, name, 0).equal(parameter)


def test_a_larger_tokenizer_is_refused(save_transformers: Save) -> None:
    _, folder = save_transformers("llama", **SMALL)
    assert Pretrained(path=str(folder)).shape(19).vocab_size == 20
    with pytest.raises(ModelError, match=r"21 ids.*20 rows.*own tokenizer"):
        Pretrained(path=str(folder)).shape(21)


def test_missing_unknown_and_misshapen_tensors(save_transformers: Save) -> None:
    _, folder = save_transformers("llama", **SMALL, tie_word_embeddings=True)
    model = Pretrained(path=str(folder))
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    model.shape(20)
    change(folder, **{"model.norm.weight": None, "model.extra": torch.ones(2)})
    with pytest.raises(ModelError, match=r"Missing: model\.norm\.weight\. Unknown: model\.extra"):
        model.shape(20)
    change(folder, **{"model.norm.weight": torch.ones(9), "model.extra": None})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as \[9\], config\.json says \[8\]"):
        model.shape(20)


def test_a_stored_tied_head_must_agree(save_transformers: Save) -> None:
    _, folder = save_transformers("llama", **SMALL, tie_word_embeddings=True)
    model = Pretrained(path=str(folder))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": table.clone()})
    shape = model.shape(20)
    assert model.weight(shape, "model.embed_tokens.weight", 0).equal(table)
    change(folder, **{"lm_head.weight": table + 1})
    with pytest.raises(ModelError, match="stored and differ"):
        model.weight(shape, "model.embed_tokens.weight", 0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    verdict = Pretrained(path=str(tmp_path / "nowhere")).probe()
    assert isinstance(verdict, Refuse)
    assert "nowhere" in verdict.why


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox'"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_key_value_heads": 3}, "2 attention heads cannot share 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window or sliding_window is off"),
        ({"layer_types": ["full_attention"]}, "layer_types ['full_attention']"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({**LLAMA, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({**MISTRAL, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**MISTRAL, "sliding_window": -1}, "sliding_window is -1"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one flat object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_what_is_not_supported_is_named(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        from_huggingface({**CONFIG, **given})
    assert named in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **given}))
    verdict = Pretrained(path=str(tmp_path)).probe()
    assert isinstance(verdict, Refuse)
    assert named in verdict.why
    assert str(tmp_path) in verdict.why


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}, ()),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, ()),
        ({"use_sliding_window": True, "sliding_window": None}, ()),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (None, 16)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, (4096, None)),
        (MISTRAL, (4096, 4096)),
        ({**MISTRAL, "sliding_window": None}, ()),
        ({**MISTRAL, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, (3, 3)),
    ],
)
def test_windows(given: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = from_huggingface({**CONFIG, **given})
    assert config.windows == windows
    assert outline(config, dtype="float32").window == min((w for w in windows if w), default=None)
    assert any("look back" in remark for remark in config.remarks) == bool(windows)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    required = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    required |= {"num_attention_heads": 32, "hidden_size": 128}  # as many as some families have of key/value heads
    theirs = AutoConfig.for_model(model_type, **required)
    ours = from_huggingface({"model_type": model_type, **required})
    names = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    assert (ours.kv_heads, ours.max_positions, ours.norm_eps, ours.tied) == tuple(getattr(theirs, n) for n in names)
    assert ours.head_dim == getattr(theirs, "head_dim", 4)
    assert ours.attention_bias == getattr(theirs, "attention_bias", False)
    assert ours.window == (theirs.sliding_window if model_type == "mistral" else None)
    assert ours.rope == Rope(theta=theirs.rope_parameters["rope_theta"])
    null = {**required, "num_attention_heads": 16, "num_key_value_heads": None}
    assert from_huggingface({"model_type": model_type, **null}).kv_heads == 16
    if model_type != "mistral":  # where transformers 5 refuses null, which older releases read so
        assert AutoConfig.for_model(model_type, **null).num_key_value_heads == 16


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 3.0}, {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}])  # fmt: skip
@pytest.mark.parametrize("window", [None, 5])
def test_both_directions_agree(model_type: str, rope: dict[str, Any], window: int | None) -> None:
    config = {"model_type": model_type, **SMALL, "rope_theta": 5e5, "rope_parameters": rope, "attention_bias": True}
    config |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 1}
    ours = from_huggingface(config)
    assert ours.rope.theta == 5e5
    assert (ours.window is None) == (window is None or model_type == "llama")
    assert from_huggingface(to_huggingface(ours, "float32")) == ours


@pytest.mark.parametrize(
    ("config", "parameters", "window"),
    [
        (
            {
                "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
                "n_positions": 1024, "vocab_size": 50257,
            },
            124_439_808, None,
        ),
        (
            {
                "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
                "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
                "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                "rope_theta": 1e4, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
            },
            7_241_732_096, 4096,
        ),
        (
            {
                "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
                "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
                "max_position_embeddings": 131072, "num_attention_heads": 14, "num_hidden_layers": 24,
                "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072,
                "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
            },
            494_032_768, None,
        ),
    ],
    ids=["gpt2", "Mistral-7B-v0.1", "Qwen2-0.5B"],
)  # fmt: skip
def test_configs_of_published_models(config: dict[str, Any], parameters: int, window: int | None) -> None:
    shape = outline(from_huggingface(config), dtype="float32")
    assert (shape.parameters, shape.window) == (parameters, window)
