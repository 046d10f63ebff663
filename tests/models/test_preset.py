"""Preset models: sizes, counts, random weights, and that transformers opens what they are exported as."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from nanovllm_models.preset import SIZES, Preset

from nanovllm_core.contracts import Accept, Batch, Module, Ops
from nanovllm_core.errors import ModelError

Build = Callable[..., Module]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_true(size: str, family: str, tied: bool) -> None:
    model = Preset(size=size, family=family, tied=tied)
    shape = model.shape(8192)
    assert (shape.hidden, shape.layers, shape.heads) == SIZES[size]
    assert (shape.kv_heads, shape.head_dim, shape.intermediate) == (shape.heads // 2, 64, 3 * shape.hidden)
    assert {"attention", "linear_cross_entropy"} < set(shape.operations)
    assert "gelu" not in shape.operations
    module = model.build(shape, Ops(dtype="float32"))
    parameters = dict(module.named_parameters())
    assert all(p.is_meta for p in parameters.values())
    assert shape.parameters == sum(p.numel() for p in parameters.values())
    assert ("lm_head.weight" in parameters) != tied
    assert len(module.blocks) == shape.layers
    assert {name for name in parameters for pattern in module.roles if fnmatch(name, pattern)} == {
        name for name in parameters if parameters[name].ndim == 2 or name.endswith("_proj.bias")
    }


def test_weights_depend_on_seed_and_name_alone() -> None:
    model = Preset(size="tiny")
    shape = model.shape(40)
    names = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
    first = [model.weight(shape, n, 7) for n in names]
    torch.manual_seed(99)
    torch.randn(5)
    state = torch.get_rng_state()
    again = [model.weight(shape, n, 7) for n in reversed(names)][::-1]
    assert torch.get_rng_state().equal(state), "the global random state is left alone"
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(first[2])
    assert not first[0].equal(model.weight(shape, names[0], 8))


def test_weights_have_their_spread() -> None:
    model = Preset(size="tiny")
    shape = model.shape(500)
    spreads = {
        "model.embed_tokens.weight": 0.02,
        "model.layers.0.self_attn.q_proj.weight": 0.02,
        "model.layers.3.self_attn.o_proj.weight": 0.02 / 8**0.5,
        "model.layers.3.mlp.down_proj.weight": 0.02 / 8**0.5,
    }
    for name, spread in spreads.items():
        weight = model.weight(shape, name, 0)
        assert float(weight.std()) == pytest.approx(spread, rel=0.02)
        assert abs(float(weight.mean())) < spread / 20
    for norm in ("norm", "layers.0.self_attn.q_norm", "layers.2.input_layernorm"):
        assert model.weight(shape, f"model.{norm}.weight", 0).eq(1).all()


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_the_export(
    build: Build, pack: Callable[..., Batch], tmp_path: Path, family: str, tied: bool
) -> None:
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = Preset(size="tiny", family=family, tied=tied, kv_heads=1, intermediate=100)
    shape = model.shape(60)
    module = build(model, shape)
    (tmp_path / "config.json").write_text(json.dumps(model.config(shape)))
    save_file({n: p.detach() for n, p in module.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 60, (50,))
    with torch.no_grad():
        assert (module(tokens, pack(50)) - theirs(tokens[None]).logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": "huge"}, "size"),
        ({"family": "gpt2"}, "family"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"intermediate": 0}, "intermediate"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        Preset(**options)


def test_the_rest_of_the_component() -> None:
    model = Preset()
    assert isinstance(model.probe(), Accept)
    assert model.tokenizer() == {"use": "bpe"}
    with pytest.raises(ModelError, match="no parameter 'x'"):
        model.weight(model.shape(9), "x", 0)
    code = "import sys, nanovllm_models.preset, nanovllm_models.pretrained; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
