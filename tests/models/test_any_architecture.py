"""The `transformers` component on architectures that have no native twin: against transformers itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovllm_models.any_architecture import Transformers
from safetensors.torch import load_file

from nanovllm_core.contracts import IGNORE, Accept, Batch, Module, Refuse
from nanovllm_core.errors import ModelError

Build = Callable[..., Module]
Pack = Callable[..., Batch]
Save = Callable[..., tuple[Any, Path]]
SMALL: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 40, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "phi": {"intermediate_size": 40, "tie_word_embeddings": True, "hidden_size": 32},
    "gemma2": {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mamba": {"state_size": 4, "intermediate_size": 48},
    "cohere": {"intermediate_size": 40, "num_key_value_heads": 2},
}
COMMON = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.fixture
def random_model(save_transformers: Save) -> Callable[[str], tuple[Any, Path]]:
    """A model of this type with random weights, and its folder."""

    def make(kind: str) -> tuple[Any, Path]:
        torch.manual_seed(zlib.crc32(kind.encode()))
        unknown = {"mamba": ("num_attention_heads",)}.get(kind, ())
        options = {k: v for k, v in COMMON.items() if k not in unknown} | SMALL[kind]
        return save_transformers(kind, **options)

    return make


@pytest.mark.parametrize("kind", SMALL)
def test_logits_loss_and_gradients(random_model: Any, build: Build, pack: Pack, kind: str) -> None:
    theirs, folder = random_model(kind)
    model = Transformers(path=str(folder))
    assert isinstance(model.probe(), Accept)
    shape = model.shape(30)
    assert set(shape.limits) == {"packing", "cache", "tensor"}
    ours = build(model, shape)
    assert shape.parameters == sum(p.numel() for p in theirs.parameters())
    stored = load_file(folder / "model.safetensors")
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in stored.items()}
    assert len(ours.blocks) == shape.layers == 2

    lengths = (5, 40, 1, 33, 38)
    tokens = torch.randint(1, 61, (sum(lengths),))
    ours.train(False)
    with torch.no_grad():
        packed = ours(tokens, pack(*lengths))
        assert packed.dtype == torch.float32
        for mine, document in zip(packed.split(lengths), tokens.split(lengths), strict=True):
            wanted = theirs(document[None]).logits[0]
            assert (mine - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()) / 10)
        select = torch.tensor([4, 44, 0])
        assert ours(tokens, pack(*lengths, select=select)).equal(packed[select])
        changed = tokens.clone()
        changed[5:45] = torch.randint(1, 61, (40,))
        others = torch.cat([torch.arange(5), torch.arange(45, sum(lengths))])
        assert ours(changed, pack(*lengths))[others].allclose(packed[others], atol=1e-6)

    labels = torch.where(torch.rand(len(tokens)) < 0.3, IGNORE, tokens)
    loss = ours(tokens, pack(*lengths), targets=labels)
    logits = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(lengths)])
    wanted = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.backward()
    wanted.backward()
    for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        expected = reference.grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert (parameter.grad - expected).abs().max() <= 1e-4 * max(1e-2, float(expected.abs().max())), name


def test_bf16_computes_over_fp32_masters(random_model: Any, build: Build, pack: Pack) -> None:
    _, folder = random_model("gpt_neox")
    model = Transformers(path=str(folder))
    shape, tokens = model.shape(61), torch.randint(1, 61, (64,))
    exact, rounded = (build(model, shape, dtype)(tokens, pack(40, 24)).detach() for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() <= 0.05 * exact.norm()


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "gpt_neoks"}, r"gpt_neoks.*did you mean 'gpt_neo"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "Its own code .* never done"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"is_encoder_decoder": True}, "encoder and decoder"),
    ],
)
def test_what_is_refused_and_why(random_model: Any, changes: dict[str, Any], why: str) -> None:
    _, folder = random_model("gpt_neox")
    rewrite(folder, **changes)
    verdict = Transformers(path=str(folder)).probe()
    assert isinstance(verdict, Refuse)
    with pytest.raises(ModelError, match=why):
        raise ModelError(verdict.why)


def test_a_model_that_sees_later_tokens_is_no_causal_model(save_transformers: Save, build: Build, pack: Pack) -> None:
    options = {**COMMON, "intermediate_size": 40, "max_position_embeddings": 64, "is_decoder": True}
    _, folder = save_transformers("bert", **options)
    rewrite(folder, is_decoder=False)
    model = Transformers(path=str(folder))
    module = build(model, model.shape(61))
    with pytest.raises(ModelError, match="sees later tokens"):
        module(torch.randint(1, 61, (9,)), pack(9))


def test_tensors_under_other_names_are_refused_by_name(save_transformers: Save) -> None:
    options = {**COMMON, "intermediate_size": 40, "num_key_value_heads": 2, "num_local_experts": 2}
    _, folder = save_transformers("mixtral", **options)
    with pytest.raises(ModelError, match=r"holds no tensor 'model\.layers\.0.*mixtures of experts"):
        Transformers(path=str(folder)).shape(61)
