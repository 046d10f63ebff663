"""`estimate_training_memory(model, ...)`: the estimate of `estimate.py` for a model at hand, by name or as an object."""

from __future__ import annotations

from os import PathLike, fspath
from types import MappingProxyType
from typing import Any, Literal

from nanovllm_core.contracts import Shape
from nanovllm_core.errors import ModelError
from nanovllm_core.estimate import training_memory
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry

GIGA = 1e9
DTYPES = MappingProxyType(
    {True: "bfloat16", "bf16": "bfloat16", "bfloat16": "bfloat16"}
    | dict.fromkeys((False, "no", "fp32", "float32"), "float32")
)
LLAMA = ("embedding", "linear", "rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")
GPT2 = ("embedding", "linear", "layer_norm", "gelu", "attention", "linear_cross_entropy")
NATIVE = MappingProxyType({**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA), "gpt2": GPT2})
"""Family -> the operations that its native model calls."""


def estimate_training_memory(
    model: str | PathLike[str] | Shape | Any,
    batch_size: int = 1,
    sequence_length: int = 2048,
    *,
    gradient_checkpointing: bool | Literal["selective"] = False,
    mixed_precision: bool | str = False,
    gradient_accumulation_steps: int = 1,
    master_weights: bool = True,
    device: str | None = None,
) -> dict[str, float]:
    """What training it with AdamW holds on one device, in bytes and GB (10^9 bytes), by what holds it.

    model: a folder or hub name, a Shape, or a model object with a Hugging Face `config`
    mixed_precision: True or "bf16": bf16 compute over fp32 weights; False or "no": fp32
    master_weights: False: weights, gradients and moments in bf16 too
    device: "cpu" or "cuda" (default: what is here)

    The keys: weights, gradients, optimizer, activations, loss, total, each also with `_gb`. `total` is the worst moment of a
    step and less than their sum. Raises ModelError for a model that has no outline to go by.
    """
    if mixed_precision not in DTYPES:
        raise ModelError(
            f"estimate_training_memory: mixed_precision: got {mixed_precision!r}, allowed: True, False, bf16, fp32"
        )
    machine = Machine.detect() if device is None else Machine(device=device)
    memory = training_memory(
        _shape(model, machine),
        tokens=batch_size * sequence_length,
        dtype=DTYPES[mixed_precision],
        device=machine.device,
        gradient_checkpointing=gradient_checkpointing,
        accumulates=gradient_accumulation_steps > 1,
        masters=master_weights,
    )
    names = ("weights", "gradients", "optimizer", "activations", "loss", "total")
    found: dict[str, float] = {name: getattr(memory, name) for name in names}
    return found | {f"{name}_gb": found[name] / GIGA for name in names}


def _shape(model: Any, machine: Machine) -> Shape:
    if isinstance(model, Shape):
        return model
    if isinstance(model, str | PathLike):
        recipe = Recipe.from_data({"model": {"use": "auto", "path": fspath(model)}})
        return plan_model(recipe, Registry.from_environment(), machine, training=True).shape
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"estimate_training_memory: got a {type(model).__name__} without a `config`; give a model of transformers, a "
            "folder or a hub name"
        )
    c = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = _first(c, "num_attention_heads", "n_head", "heads")
    hidden = _first(c, "hidden_size", "n_embd", "hidden")
    family = str(getattr(c, "model_type", None) or getattr(c, "family", ""))
    names = [name for name, _ in model.named_parameters()]
    return Shape(
        family=family,
        vocab_size=_first(c, "vocab_size"),
        layers=_first(c, "num_hidden_layers", "n_layer", "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_first(c, "num_key_value_heads", "kv_heads", default=heads),
        head_dim=_first(c, "head_dim", default=hidden // max(1, heads)),
        intermediate=_first(c, "intermediate_size", "n_inner", "intermediate", default=4 * hidden),
        tied=not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in names),
        max_positions=_first(c, "max_position_embeddings", "n_positions", "max_positions", default=1 << 20),
        parameters=sum(p.numel() for p in model.parameters()),
        operations=NATIVE.get(family, ()),
        qk_norm=any(name.endswith("q_norm.weight") for name in names),
    )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if default is None:
        raise ModelError(f"estimate_training_memory: the model's config has no {names[0]}")
    return default
