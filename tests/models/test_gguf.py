"""GGUF files: written here tensor by tensor, opened through the components, compared with transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from nanovllm_models.any_architecture import Transformers
from nanovllm_models.pretrained import Pretrained
from nanovllm_tokenizers.bpe import train
from nanovllm_tokenizers.hf import Hf

from nanovllm_core import Machine, Recipe, Registry, make_plan, run
from nanovllm_core.contracts import Accept, Batch, Module, Refuse
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.llm import LLM

Build = Callable[..., Module]
Pack = Callable[..., Batch]
Save = Callable[..., tuple[Any, Path]]
LAYERS, HEADS, KV_HEADS, HEAD, HIDDEN, MLP, VOCAB = 2, 4, 2, 16, 64, 96, 300
TEXTS = ["the old mill stands by the river"] * 5 + ["a stone bridge over the river, and trout under it"] * 5
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order that GGUF's rotary embedding expects."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def written(save_transformers: Save, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """(quantised type or None) -> a random Llama of transformers, and the GGUF file of it with a tokenizer."""

    def make(quantised: gguf.GGMLQuantizationType | None = None) -> tuple[Any, Path]:
        theirs, _ = save_transformers(
            "llama", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, max_position_embeddings=128,
            tie_word_embeddings=False, rms_norm_eps=1e-5,
        )  # fmt: skip
        file = tmp_path / "small.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(HEAD)
        writer.add_rope_freq_base(10_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(VOCAB)
        backend = train(TEXTS, VOCAB).backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
        merges = json.loads(backend.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        for name, parameter in theirs.state_dict().items():
            values = parameter.numpy().copy()
            parts = name.removesuffix(".weight").split(".", 3)
            if name.startswith("model.layers."):
                new = f"blk.{parts[2]}.{NAMES[parts[3]]}.weight"
            else:
                new = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
                    name.removesuffix(".weight")
                ] + ".weight"
            if "q_proj" in name or "k_proj" in name:
                values = interleaved(values, HEADS if "q_proj" in name else KV_HEADS)
            if quantised is not None and values.ndim == 2:
                writer.add_tensor(new, gguf.quantize(values, quantised), raw_dtype=quantised)
            else:
                writer.add_tensor(new, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return theirs, file

    return make


def test_logits_are_those_of_the_model_that_was_written(written: Any, build: Build, pack: Pack) -> None:
    theirs, file = written()
    model = Pretrained(path=str(file))
    assert isinstance(model.probe(), Accept)
    shape = model.shape(VOCAB)
    assert (shape.dtype, shape.tied, shape.max_positions) == ("float32", False, 128)
    tokens = torch.randint(0, VOCAB, (90,))
    with torch.no_grad():
        mine, wanted = build(model, shape)(tokens, pack(90)), theirs(tokens[None]).logits[0]
    assert (mine - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()) / 10)
    assert model.config(shape)["architectures"] == ["LlamaForCausalLM"]
    tokenizer = Hf(path=str(file)).make(list, VOCAB)
    assert tokenizer.encode(["the river"])[0] == train(TEXTS, VOCAB).encode(["the river"])[0]


def test_quantised_values_become_plain_ones(written: Any, build: Build, pack: Pack) -> None:
    theirs, file = written(gguf.GGMLQuantizationType.Q8_0)
    model = Pretrained(path=str(file))
    shape = model.shape(VOCAB)
    assert shape.dtype == "bfloat16"
    weight = model.weight(shape, "model.layers.1.mlp.up_proj.weight", 0)
    wanted = theirs.model.layers[1].mlp.up_proj.weight
    assert 0 < (weight.float() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_a_recipe_fine_tunes_it_and_the_result_is_an_ordinary_folder(written: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, file = written()
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"{text} {i}")
    recipe = Recipe.from_data(
        {
            "data": {"path": "docs", "max_seq_length": 32, "min_chunk_size": 4},
            "model": {"use": "pretrained", "path": file.name},
            "train": {"max_steps": 2, "learning_rate": 1e-3},
            "generate": {"prompts": ["the old"], "max_tokens": 4},
            "callbacks": [],
            "output_dir": "out",
        },
        base=tmp_path,
    )
    out = run(make_plan(recipe, Registry.from_environment(), Machine()))
    opened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)("the old mill", return_tensors="pt").input_ids
    greedy = opened.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    params = SamplingParams(temperature=0, max_tokens=6)
    assert LLM(out, machine=Machine()).generate(ids[0].tolist(), params)[0]["token_ids"] == greedy


def test_a_damaged_file_and_the_wrong_component_say_so(written: Any, tmp_path: Path) -> None:
    _, file = written()
    verdict = Transformers(path=str(file)).probe()
    assert isinstance(verdict, Refuse)
    assert "use: pretrained" in verdict.why
    file.write_bytes(file.read_bytes()[:200])
    verdict = Pretrained(path=str(file)).probe()
    assert isinstance(verdict, Refuse)
    assert "cannot open this GGUF file" in verdict.why
