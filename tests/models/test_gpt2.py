"""GPT-2 folders as they come, old ones too, and what of their configs is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovllm_models.families import from_huggingface
from nanovllm_models.pretrained import Pretrained
from safetensors.torch import load_file, save_file

from nanovllm_core.contracts import Accept, Batch, Module, Ops, Refuse
from nanovllm_core.errors import ModelError

Build = Callable[..., Module]
Save = Callable[..., tuple[Any, Path]]
SMALL = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **SMALL}


def aged(file: Path, prefix: str, **more: torch.Tensor) -> None:
    """The file as the first GPT-2 folders had it: names without their prefix, and the causal masks."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    named = {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in tensors.items()}
    save_file({**named, **more}, file, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False])
def test_old_folders(
    build: Build, pack: Callable[..., Batch], save_transformers: Save, prefix: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    _, folder = save_transformers("gpt2", **SMALL, tie_word_embeddings=tied)
    aged(folder / "model.safetensors", prefix)
    model = Pretrained(path=str(folder))
    ours, tokens = build(model, model.shape(20)), torch.randint(0, 20, (16,))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    with torch.no_grad():
        assert (ours(tokens, pack(16)) - theirs(tokens[None]).logits[0]).abs().max() <= 1e-4


def test_what_an_old_folder_lacks_or_has_too_much_is_named(save_transformers: Save) -> None:
    _, folder = save_transformers("gpt2", **SMALL)
    model, file = Pretrained(path=str(folder)), folder / "model.safetensors"
    aged(file, "", **{"h.2.attn.c_attn.bias": torch.ones(24)})
    with pytest.raises(ModelError, match=r"Missing: none\. Unknown: h\.2\.attn\.c_attn\.bias"):
        model.shape(20)
    aged(file, "", **{"h.2.attn.c_attn.bias": torch.ones(24), "ln_f.bias": torch.ones(9)})
    save_file({k: v for k, v in load_file(file).items() if "h.2." not in k}, file)
    with pytest.raises(ModelError, match=r": ln_f\.bias is stored as \[9\], config\.json says \[8\]"):
        model.shape(20)
    save_file({k: v for k, v in load_file(file).items() if k != "ln_f.bias"}, file)
    with pytest.raises(ModelError, match=r"Missing: transformer\.ln_f\.bias"):
        model.shape(20)


def test_a_stored_tied_head_must_agree(save_transformers: Save) -> None:
    _, folder = save_transformers("gpt2", **SMALL)
    table = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    aged(folder / "model.safetensors", "", **{"lm_head.weight": table + 1})
    model = Pretrained(path=str(folder))
    with pytest.raises(ModelError, match=r"lm_head\.weight and wte\.weight are stored and differ"):
        model.weight(model.shape(20), "transformer.wte.weight", 0)


def test_it_cannot_be_split_and_says_so(save_transformers: Save) -> None:
    _, folder = save_transformers("gpt2", **SMALL)
    model = Pretrained(path=str(folder))
    shape = model.shape(20)
    assert (shape.family, shape.max_positions, shape.window) == ("gpt2", 16, None)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate) == (2, 2, 4, 32)
    assert set(shape.limits) == {"tensor"}
    assert "c_attn" in shape.limits["tensor"]
    module = model.build(shape, Ops(dtype="float32"))
    assert module.roles == {}
    assert len(module.blocks) == 2
    assert {"layer_norm", "gelu"} < set(shape.operations)
    assert not {"rms_norm", "rotary", "swiglu"} & set(shape.operations)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "dropout (attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1) is not applied"),
        ({"attn_pdrop": 0.0, "embd_pdrop": 0, "resid_pdrop": 0.2}, "dropout (resid_pdrop 0.2) is not applied"),
        ({"attn_pdrop": 0.0, "embd_pdrop": 0, "resid_pdrop": 0.0}, None),
    ],
)
def test_dropout_is_accepted_and_said(tmp_path: Path, given: dict[str, Any], said: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **given}))
    verdict = Pretrained(path=str(tmp_path)).probe()
    assert isinstance(verdict, Accept)
    assert verdict.why == "gpt2 on a native module" + (f"; {said}" if said else "")


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    required = {k: v for k, v in SMALL.items() if k != "n_positions"}
    theirs, ours = AutoConfig.for_model("gpt2", **required), from_huggingface({"model_type": "gpt2", **required})
    assert (ours.max_positions, ours.norm_eps, ours.tied, ours.intermediate) == (
        theirs.n_positions, theirs.layer_norm_epsilon, theirs.tie_word_embeddings, 4 * theirs.n_embd,
    )  # fmt: skip
    assert theirs.activation_function == "gelu_new"
    assert (theirs.attn_pdrop, theirs.embd_pdrop, theirs.resid_pdrop) == (0.1, 0.1, 0.1)
    assert ours == from_huggingface({"model_type": "gpt2", **required, "activation_function": "gelu_new"})
    assert ours != from_huggingface({"model_type": "gpt2", **required, "activation_function": "gelu"})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n_embd": None}, "n_embd is missing"),
        ({"n_embd": 9}, "n_embd 9 cannot be split over 2 heads"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"activation_function": "relu"}, "activation_function 'relu' (supported: gelu_new, gelu_pytorch_tanh, gelu)"),
        ({"activation_function": ["gelu"]}, "activation_function is ['gelu']"),
        ({"scale_attn_weights": False}, "scale_attn_weights false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
    ],
)
def test_what_is_not_supported_is_named(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **given}))
    verdict = Pretrained(path=str(tmp_path)).probe()
    assert isinstance(verdict, Refuse)
    assert named in verdict.why
    assert str(tmp_path) in verdict.why
