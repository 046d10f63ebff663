"""Llama and the families that differ from it in little: `TransformerConfig` and its Hugging Face spelling.

Qwen2 has biases on query, key and value; Qwen3 has norms of query and key heads; Mistral looks back through a sliding
window, the Qwens may do so in some blocks; defaults differ. What a config asks for beyond that is refused by name rather
than ignored: ignoring it would give other logits without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm_core.errors import ModelError
from nanovllm_models.config import TransformerConfig
from nanovllm_models.families.reader import LAYERS, Reader, refuse
from nanovllm_models.families.rope import rope_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
QWENS = ("qwen2", "qwen3")
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
# What `transformers` takes a missing key for, where the families differ. Null is not missing: it has its own meaning.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
FULL, SLIDING = "full_attention", "sliding_attention"


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
        "architectures": [ARCHITECTURES[c.family]],
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
    elif c.family == "mistral":
        config["sliding_window"] = c.window
    else:
        config |= {"use_sliding_window": c.window is not None, "sliding_window": c.window}
        if c.windows:
            config["layer_types"] = [SLIDING if w else FULL for w in c.windows]
    return config


def from_huggingface(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration of a model of these families. Raises ModelError naming what is missing or not supported."""
    family = config["model_type"]
    config = {**DEFAULTS[family], **config}
    read = Reader(config)
    refuse(
        config,
        ARCHITECTURES[family],
        {
            f"hidden_act {config.get('hidden_act')!r} (supported: silu)": config.get("hidden_act", "silu") != "silu",
            f"attention_dropout {config.get('attention_dropout')} (supported: 0)": bool(
                config.get("attention_dropout")
            ),
        },
    )
    heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
    layers, max_positions = read.size("num_hidden_layers", most=LAYERS), read.size("max_position_embeddings")
    windows = _windows(config, family, layers)
    sliding = [w for w in windows if w is not None]
    c = TransformerConfig(
        family=family,
        vocab_size=read.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=read.size("head_dim", hidden // heads),
        intermediate=read.size("intermediate_size"),
        tied=read.value("tie_word_embeddings", bool, False),
        max_positions=max_positions,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        remarks=tuple(f"{len(sliding)} of {layers} blocks look back {w} tokens" for w in sliding[:1]),
        rope=rope_of(config, max_positions),
        attention_bias=family in ("llama", "qwen3") and read.value("attention_bias", bool, False),
        mlp_bias=family == "llama" and read.value("mlp_bias", bool, False),
        windows=windows,
    )
    if c.heads % c.kv_heads:
        raise ModelError(f"config.json: {c.heads} attention heads cannot share {c.kv_heads} key/value heads evenly")
    if c.head_dim % 2:
        raise ModelError(f"config.json: head_dim {c.head_dim} is odd; rotary positions need an even one")
    return c


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """`TransformerConfig.windows`. Mistral slides everywhere; a Qwen from block max_window_layers on, or as it lists."""
    read, window, first = Reader(config), None, 0
    slides = family == "mistral" or (family in QWENS and read.value("use_sliding_window", bool, False))
    if slides and config["sliding_window"] is not None:
        window = read.size("sliding_window")
        first = read.size("max_window_layers", least=0) if family in QWENS else 0
    usual = [FULL if window is None or i < first else SLIDING for i in range(layers)]
    kinds = config.get("layer_types") or usual
    if family in QWENS:
        allowed = f"{layers} of {FULL} or {SLIDING}"
        fits = isinstance(kinds, list) and len(kinds) == layers and all(kind in (FULL, SLIDING) for kind in kinds)
    else:  # transformers takes no notice of the list here, so it must say what is done anyway
        allowed, fits = str(usual), kinds == usual
    if not fits:
        raise ModelError(f"config.json asks for layer_types {kinds}: not supported; supported: {allowed}")
    if window is None and SLIDING in kinds:
        raise ModelError(f"config.json: layer_types names {SLIDING}, but use_sliding_window or sliding_window is off")
    return tuple(window if kind == SLIDING else None for kind in kinds) if SLIDING in kinds else ()
