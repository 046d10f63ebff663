"""What the native transformer can be, and its two spellings: `TransformerConfig` and a Hugging Face config dict.

The Llama and Qwen3 families differ in biases, in Qwen3's norms of query and key heads, and in defaults. What a config
asks for beyond that is refused by name rather than ignored: ignoring it would give other logits without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nanovllm_core.errors import ModelError, listed
from nanovllm_models.config import Rope, TransformerConfig

ROPE_KINDS = ("default", "linear", "llama3")


# What `transformers` takes a missing key for.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM", "max_position_embeddings": 2048},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "max_position_embeddings": 32768, "head_dim": 128},
}


def to_huggingface(c: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model: what `transformers.AutoModelForCausalLM` and other engines read."""
    rope: dict[str, Any] = {"rope_type": c.rope.kind, "rope_theta": c.rope.theta}
    if c.rope.kind != "default":
        rope["factor"] = c.rope.factor
    if c.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": c.rope.low_factor,
            "high_freq_factor": c.rope.high_factor,
            "original_max_position_embeddings": c.rope.original,
        }
    config: dict[str, Any] = {
        "architectures": [FAMILIES[c.family]["architecture"]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,  # for readers older than rope_parameters
        "rope_parameters": rope,
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": c.tied,
        "use_cache": True,
        "dtype": dtype,
    }
    if c.family == "llama":
        config["mlp_bias"] = c.mlp_bias
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config


def from_huggingface(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration of a supported model. Raises ModelError naming what is missing or not supported."""
    read = _Reader(config)
    family = read.value("model_type", str)
    if family not in FAMILIES:
        raise ModelError(f"config.json: model_type {family!r} is not supported; supported: {listed(FAMILIES)}")
    defaults = FAMILIES[family]
    _refuse_unsupported(config, read, family)
    heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
    c = TransformerConfig(
        family=family,
        vocab_size=read.size("vocab_size"),
        hidden=hidden,
        layers=read.size("num_hidden_layers"),
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=read.size("head_dim", defaults.get("head_dim", hidden // heads)),
        intermediate=read.size("intermediate_size"),
        tied=read.value("tie_word_embeddings", bool, False),
        max_positions=read.size("max_position_embeddings", defaults["max_position_embeddings"]),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope=_rope(config, read.size("max_position_embeddings", defaults["max_position_embeddings"])),
        attention_bias=read.value("attention_bias", bool, False),
        mlp_bias=family == "llama" and read.value("mlp_bias", bool, False),
    )
    if c.heads % c.kv_heads:
        raise ModelError(f"config.json: {c.heads} attention heads cannot share {c.kv_heads} key/value heads evenly")
    if c.head_dim % 2:
        raise ModelError(f"config.json: head_dim {c.head_dim} is odd; rotary positions need an even one")
    return c


def _refuse_unsupported(config: Mapping[str, Any], read: _Reader, family: str) -> None:
    wanted = FAMILIES[family]["architecture"]
    architectures = config.get("architectures") or [wanted]
    layers = read.size("num_hidden_layers")
    kinds = config.get("layer_types") or ["full_attention"]
    slides = (
        family == "qwen3"
        and not config.get("layer_types")
        and config.get("use_sliding_window")
        and config.get("sliding_window", 4096) is not None
        and config.get("max_window_layers", 28) < layers
    )
    checks = {
        f"architectures {architectures} (supported: {wanted})": wanted not in architectures,
        "quantization_config (quantised weights); take the original model": bool(config.get("quantization_config")),
        f"hidden_act {config.get('hidden_act')!r} (supported: silu)": config.get("hidden_act", "silu") != "silu",
        f"layer_types {kinds} (supported: full_attention)": set(kinds) != {"full_attention"},
        "sliding-window attention (use_sliding_window)": bool(slides),
        f"attention_dropout {config.get('attention_dropout')} (supported: 0)": bool(config.get("attention_dropout")),
    }
    for what, present in checks.items():
        if present:
            raise ModelError(f"config.json asks for {what}: not supported")


def _rope(config: Mapping[str, Any], max_positions: int) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
        raise ModelError(f"config.json: rotary parameters {given!r} are not one flat object")
    read = _Reader(given)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(f"config.json asks for rope_type {kind!r}: not supported; supported: {', '.join(ROPE_KINDS)}")
    for part in (given.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise ModelError(f"config.json asks for partial_rotary_factor {part}: not supported")
    theta = read.number("rope_theta", _Reader(config).number("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=read.number("factor"))
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    rope = Rope(
        theta=theta,
        kind=kind,
        factor=read.number("factor"),
        low_factor=read.number("low_freq_factor"),
        high_factor=read.number("high_freq_factor"),
        original=_Reader({"original_max_position_embeddings": original}).size(
            "original_max_position_embeddings", max_positions
        ),
    )
    if rope.high_factor <= rope.low_factor:
        low, high = rope.low_factor, rope.high_factor
        raise ModelError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
    return rope


_REQUIRED = object()


class _Reader:
    """Typed values of a config dict; null counts as absent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"config.json: {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"config.json: {key} is {value!r}, expected {kind.__name__}")
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        value: int = self.value(key, int, default)
        if value < 1:
            raise ModelError(f"config.json: {key} is {value}, expected at least 1")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        number = self.config.get(key)
        if not isinstance(number, int) or isinstance(number, bool):
            number = self.value(key, float, default)
        if not (math.isfinite(number) and number > 0):
            raise ModelError(f"config.json: {key} is {number}, expected a positive number")
        return float(number)
