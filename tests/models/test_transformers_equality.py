"""The native models against transformers: logits, loss and gradients of random small models, and of a real one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovllm_models.pretrained import Pretrained

from nanovllm_core.contracts import IGNORE, Batch, Module

Build = Callable[..., Module]
Pack = Callable[..., Batch]
Save = Callable[..., tuple[Any, Path]]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}


FAMILIES = ["llama", "qwen3", "qwen2", "mistral", "gpt2"]


def random_options(model_type: str, seed: int) -> dict[str, Any]:
    """A small config; every fourth seed has the same rope, every other is tied, biases and windows come and go."""
    draw = random.Random(f"{model_type}{seed}")
    if model_type == "gpt2":
        heads = draw.choice([1, 2, 3, 5])
        return {
            "vocab_size": draw.randint(30, 90),
            "n_embd": heads * draw.choice([4, 7, 10]),
            "n_layer": draw.randint(1, 3),
            "n_head": heads,
            "n_inner": draw.choice([None, draw.randint(20, 70)]),
            "n_positions": draw.randint(90, 128),
            "activation_function": ["gelu_new", "gelu", "gelu_pytorch_tanh"][seed % 3],
            "layer_norm_epsilon": draw.choice([1e-5, 1e-6, 1e-3]),
            "tie_word_embeddings": seed % 2 == 0,
        }
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 3])
    head_dim = draw.choice([8, 12, 16])
    options: dict[str, Any] = {
        "vocab_size": draw.randint(30, 90),
        "hidden_size": heads * head_dim if model_type == "llama" and seed % 3 == 0 else heads * draw.choice([4, 7, 10]),
        "intermediate_size": draw.randint(20, 70),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": seed % 2 == 0,
        "attention_bias": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "max_position_embeddings": 128,
        "rope_parameters": [None, LINEAR, LLAMA3, {"rope_type": "default", "rope_theta": 77.0}][seed % 4],
    }
    if model_type == "llama":
        options["mlp_bias"] = draw.random() < 0.5
    if model_type == "mistral":
        options["sliding_window"] = None if seed % 4 == 0 else draw.choice([2, 7, 30, 64])
    if model_type.startswith("qwen"):
        options |= {"use_sliding_window": seed % 4 > 0, "sliding_window": draw.choice([2, 7, 30, 64])}
        options["max_window_layers"] = draw.randint(0, options["num_hidden_layers"])
        if seed % 4 == 3:
            kinds = ["full_attention", "sliding_attention"]
            options["layer_types"] = [draw.choice(kinds) for _ in range(options["num_hidden_layers"])]
    if model_type == "qwen2":
        del options["attention_bias"]
    if model_type in ("qwen2", "mistral") and seed % 3 == 0:  # the size of a head follows from the others
        del options["head_dim"]
        options["hidden_size"] = heads * head_dim
    return {k: v for k, v in options.items() if v is not None or k == "sliding_window"}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
def test_random_models(build: Build, pack: Pack, save_transformers: Save, model_type: str, seed: int) -> None:
    torch.manual_seed(seed)
    theirs, folder = save_transformers(model_type, **random_options(model_type, seed))
    model = Pretrained(path=str(folder))
    shape = model.shape(3)
    ours = build(model, shape)
    assert shape.parameters == sum(p.numel() for p in theirs.parameters())
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}

    lengths = (5, 90, 1, 33)
    tokens = torch.randint(0, shape.vocab_size, (sum(lengths),))
    with torch.no_grad():
        packed = ours(tokens, pack(*lengths))
        assert packed.dtype == torch.float32
        for mine, document in zip(packed.split(lengths), tokens.split(lengths), strict=True):
            wanted = theirs(document[None]).logits[0]
            assert (mine - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()) / 10)
            alone = ours(document, pack(len(document)))
            assert (mine - alone).abs().max() <= 1e-5 * max(1.0, float(alone.abs().max()))
        select = torch.tensor([4, 94, 0, 94])
        assert ours(tokens, pack(*lengths, select=select)).allclose(packed[select], atol=1e-5, rtol=1e-5)

    document = tokens[5:95]
    labels = torch.where(torch.rand(90) < 0.3, IGNORE, document)
    targets = torch.cat([labels[1:], torch.tensor([IGNORE])])
    loss = ours(document, pack(90), targets=targets) / (targets != IGNORE).sum()
    wanted = theirs(input_ids=document[None], labels=labels[None]).loss
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.backward()
    wanted.backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = reference[name].grad
        assert (parameter.grad - expected).abs().max() <= 1e-4 * max(1e-2, float(expected.abs().max())), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_another_document_moves_no_bit(build: Build, pack: Pack, save_transformers: Save, model_type: str) -> None:
    _, folder = save_transformers(model_type, **random_options(model_type, 3))
    model = Pretrained(path=str(folder))
    shape = model.shape(30)
    ours, lengths = build(model, shape), (40, 3, 40, 77)
    first = torch.randint(0, 30, (sum(lengths),))
    with torch.no_grad():
        before = ours(first, pack(*lengths)).split(lengths)
        for changed in range(len(lengths)):
            documents = list(first.split(lengths))
            documents[changed] = (documents[changed] + 1) % 30
            after = ours(torch.cat(documents), pack(*lengths)).split(lengths)
            assert [a.equal(b) for a, b in zip(before, after, strict=True)] == [i != changed for i in range(4)]


@pytest.mark.parametrize("model_type", FAMILIES[:4])
@pytest.mark.parametrize("rope", [LINEAR, LLAMA3])
def test_old_spelling_of_rope(
    build: Build, pack: Pack, save_transformers: Save, model_type: str, rope: dict[str, Any]
) -> None:
    """`rope_theta` beside `rope_scaling`, as model folders had it before transformers 5."""
    theirs, folder = save_transformers(model_type, **{**random_options(model_type, 1), "rope_parameters": rope})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    new = config.pop("rope_parameters")
    config["rope_theta"] = new.pop("rope_theta")
    config["rope_scaling"] = {**{k: v for k, v in new.items() if k != "rope_type"}, "type": new["rope_type"]}
    file.write_text(json.dumps(config))
    model = Pretrained(path=str(folder))
    tokens = torch.randint(0, 30, (100,))
    with torch.no_grad():
        mine, wanted = build(model, model.shape(30))(tokens, pack(100)), theirs(tokens[None]).logits[0]
    assert (mine - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()) / 10)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bf16_stays_near_fp32(build: Build, pack: Pack, save_transformers: Save, model_type: str) -> None:
    _, folder = save_transformers(model_type, **random_options(model_type, 5))
    model = Pretrained(path=str(folder))
    shape, tokens = model.shape(30), torch.randint(0, 30, (64,))
    exact, rounded = (build(model, shape, dtype)(tokens, pack(40, 24)).detach() for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() <= 0.05 * exact.norm()


def test_smollm2(build: Build, pack: Pack, smollm2: Path) -> None:
    """A real model: the same logits and loss, packed as alone.

    On some processors transformers' own fp32 logits are 1e-4 from those in fp64, and products of other shapes, as
    packing makes them, round differently by about 2e-4.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Pretrained(path=str(smollm2))
    shape = model.shape(49152)
    assert shape.parameters == 134_515_008
    assert shape.dtype == "bfloat16"
    ours = build(model, shape)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = ("The package manager resolves dependencies before it", "def area(radius):\n    return 3.14 *", "Once")
    documents = [torch.tensor(tokenizer.encode(text)) for text in texts]
    lengths = tuple(len(d) for d in documents)
    with torch.no_grad():
        packed = ours(torch.cat(documents), pack(*lengths))
        for beside, document in zip(packed.split(lengths), documents, strict=True):
            wanted = theirs(document[None]).logits[0]
            assert (ours(document, pack(len(document))) - wanted).abs().max() <= 1e-4
            assert (beside - wanted).abs().max() <= 5e-4
        document = documents[0]
        targets = torch.cat([document[1:], torch.tensor([IGNORE])])
        loss = ours(document, pack(len(document)), targets=targets) / (len(document) - 1)
        assert float(loss) == pytest.approx(float(theirs(document[None], labels=document[None]).loss), rel=1e-5)
