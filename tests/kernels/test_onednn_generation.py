"""A model on the `onednn` kernels says what it says on the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm_core import LLM, Machine, Recipe, Registry, SamplingParams
from nanovllm_core.assemble import assemble, models_of, tokenizer_of
from nanovllm_core.plan_model import plan_model
from nanovllm_core.training.export import export

PROMPTS = [[5], [7, 200, 31], list(range(3, 73)), [9, 9, 12, 250, 40]]
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (30, 30, 20, 25)]
HERE = Machine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tiny` preset with random weights."""
    made = tmp_path_factory.mktemp("tiny")
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": 300}}
    plan = plan_model(Recipe.from_data(data), Registry.from_environment(), HERE)
    tokenizer = tokenizer_of(plan, lambda: ["the river runs past old mills"])
    module = assemble(plan, "cpu", seed=1, training=False).module
    with torch.no_grad():  # random rows are far apart, so that no two tokens are nearly as likely
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    export(made, module.named_parameters(), models_of(plan).config(shape=plan.shape), tokenizer, "float32")
    return made


def packing(packed: str) -> dict[str, Any]:
    ours = {"use": "onednn", "packed": packed}
    return {"*": "auto", "linear": ours, "norm_linear": ours}


@pytest.mark.parametrize("kernels", ["auto", packing("none"), packing("head"), packing("all")])
def test_greedy_tokens_are_those_of_the_reference(folder: Path, kernels: Any) -> None:
    llm, reference = LLM(folder, kernels=kernels, machine=HERE), LLM(folder, kernels="torch", machine=HERE)
    assert llm.plan.kernels["norm_linear"].entry.name == llm.plan.kernels["rotary"].entry.name == "onednn"
    assert llm.plan.kernels["attention"].entry.name == llm.plan.kernels["paged_attention"].entry.name == "torch"
    prompts = [[i % llm.tokenizer.vocab_size for i in ids] for ids in PROMPTS]
    for batch in (prompts, prompts[:1], prompts[2:3]):
        wanted = reference.generate(batch, PARAMS[: len(batch)])
        assert llm.generate(batch, PARAMS[: len(batch)]) == wanted
        assert len({i for answer in wanted for i in answer["token_ids"]}) > 2, "or this shows little"


@pytest.mark.parametrize("packed", ["none", "all"])
def test_bfloat16_answers(folder: Path, packed: str) -> None:
    """The first tokens: roundings may part them later."""
    given = {"dtype": "bfloat16", "machine": HERE}
    llm, reference = LLM(folder, kernels=packing(packed), **given), LLM(folder, kernels="torch", **given)
    assert {c.entry.name for n, c in llm.plan.kernels.items() if n in ("linear", "rms_norm")} == {"onednn"}
    prompts, params = [[1, 2, 3], [4]], SamplingParams(temperature=0, max_tokens=1)
    assert llm.generate(prompts, params) == reference.generate(prompts, params)


def test_training_is_the_reference() -> None:
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": 300}}
    plan = plan_model(Recipe.from_data(data), Registry.from_environment(), HERE)
    assert {choice.entry.name for choice in plan.kernels.values()} == {"torch"}
    assert "generation" in dict(plan.kernels["linear"].refused)["onednn"]
