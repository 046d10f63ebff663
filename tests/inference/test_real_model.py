"""A real model's greedy text is the one that transformers writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nanovllm_core import LLM, Machine, SamplingParams


@pytest.mark.skipif(
    "NANOVLLM_ASSETS" not in os.environ, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)"
)
def test_a_real_model_answers_as_in_transformers() -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(os.environ["NANOVLLM_ASSETS"]) / "smollm2-135m"
    llm = LLM(folder, dtype="float32", machine=Machine())
    prompts = ["The capital of France is", "Once upon a time, in a small village by the sea,"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[*llm.tokenizer.prefix_ids, *llm.tokenizer.encode([prompt])[0]]])
        wanted = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, repetition_penalty=1.0
        )
        assert output["token_ids"] == wanted[0, ids.shape[1] :].tolist()
    assert "Paris" in outputs[0]["text"]
