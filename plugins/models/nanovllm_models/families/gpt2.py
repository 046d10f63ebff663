"""GPT-2's `config.json`. What it asks for beyond the native module is refused by name, dropout excepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm_core.errors import ModelError
from nanovllm_models.families.reader import LAYERS, Reader, refuse
from nanovllm_models.gpt2_config import Gpt2Config

ARCHITECTURE = "GPT2LMHeadModel"
GELUS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}  # name -> by tanh
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")


def from_huggingface(config: Mapping[str, Any]) -> Gpt2Config:
    """The configuration of a GPT-2. Raises ModelError naming what is missing or not supported."""
    read = Reader(config)
    activation = read.value("activation_function", str, "gelu_new")
    refuse(
        config,
        ARCHITECTURE,
        {
            f"activation_function {activation!r} (supported: {', '.join(GELUS)})": activation not in GELUS,
            "scale_attn_weights false": not read.value("scale_attn_weights", bool, True),
            "scale_attn_by_inverse_layer_idx": read.value("scale_attn_by_inverse_layer_idx", bool, False),
            "reorder_and_upcast_attn": read.value("reorder_and_upcast_attn", bool, False),
            "add_cross_attention": read.value("add_cross_attention", bool, False),
        },
    )
    hidden, heads = read.size("n_embd"), read.size("n_head")
    if hidden % heads:
        raise ModelError(f"config.json: n_embd {hidden} cannot be split over {heads} heads evenly")
    dropout = [f"{key} {rate}" for key in DROPOUTS if (rate := config.get(key, 0.1))]
    return Gpt2Config(
        family="gpt2",
        vocab_size=read.size("vocab_size"),
        hidden=hidden,
        layers=read.size("n_layer", most=LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=read.size("n_inner", 4 * hidden),
        tied=read.value("tie_word_embeddings", bool, True),
        max_positions=read.size("n_positions", 1024),
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        remarks=(f"dropout ({', '.join(dropout)}) is not applied",) if dropout else (),
        gelu_tanh=GELUS[activation],
    )
