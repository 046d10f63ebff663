"""`estimate_training_memory` by name, outline and object: one model, one answer."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from nanovllm.training.memory import estimate_training_memory
from nanovllm_core.errors import ModelError
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry

MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128)),
}


@pytest.mark.parametrize("family", MODELS)
def test_an_object_its_folder_and_its_outline_have_one_estimate(family, tmp_path):
    model = MODELS[family]()
    model.save_pretrained(tmp_path)
    recipe = Recipe.from_data(
        {"model": {"use": "pretrained", "path": str(tmp_path)}, "tokenizer": {"use": "bpe", "size": 290}}
    )
    shape = plan_model(recipe, Registry.from_environment(), Machine()).shape
    asked = {"batch_size": 2, "sequence_length": 64, "mixed_precision": True, "device": "cpu"}
    found = estimate_training_memory(model, **asked)
    assert found == estimate_training_memory(shape, **asked)
    assert found["total_gb"] == pytest.approx(found["total"] / 1e9)
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())
    less = estimate_training_memory(model, 2, 64, gradient_checkpointing=True, mixed_precision="bf16", device="cpu")
    assert less["activations"] < found["activations"]


def test_what_cannot_be_estimated_is_said():
    import torch

    with pytest.raises(ModelError, match="got a Linear without a `config`"):
        estimate_training_memory(torch.nn.Linear(2, 2), device="cpu")
    with pytest.raises(ModelError, match="mixed_precision: got 'fp8'"):
        estimate_training_memory("anything", mixed_precision="fp8")
