"""A small model of each family, fine-tuned by a recipe: transformers opens the result with the same logits and text."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm_core import LLM, Machine, SamplingParams
from nanovllm_core.contracts import Batch

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "mistral": {**SIZES, "sliding_window": 9},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {**SIZES, "head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_and_back(go, folder, family):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=400, initializer_range=0.2, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    if family == "gpt2":  # as the real folder has it: no prefix, and the causal masks
        file = folder / "base" / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 128, 128).tril()}, file, {"format": "pt"})
    out, watch = go("model={use: pretrained, path: base}")
    losses = [metrics["loss"] for metrics in watch.steps.values()]
    assert losses[-1] < losses[0]

    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    llm, prompt = LLM(out, machine=Machine()), "The river runs past old mills and under a stone bridge"
    ids = AutoTokenizer.from_pretrained(out)(prompt, return_tensors="pt").input_ids
    n = ids.shape[1]
    batch = Batch(positions=torch.arange(n), lengths=(n,), cu_seqlens=torch.tensor([0, n], dtype=torch.int32))
    with torch.no_grad():
        torch.testing.assert_close(llm.module(ids[0], batch), theirs(ids).logits[0], rtol=0, atol=1e-4)
    ours = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=40))[0]["token_ids"]
    assert n + len(ours) > 2 * 9, "the window was left behind"
    assert ours == theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, n:].tolist()[: len(ours)]
