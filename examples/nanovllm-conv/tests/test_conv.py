"""The model, by nano-vllm's conformance kit; then what is its own."""

import json

import pytest
import torch
from nanovllm_conv.component import Conv
from nanovllm_conv.config import ConvConfig

from nanovllm_core import LLM, Machine, Recipe, Registry, SamplingParams
from nanovllm_core.assemble import assemble, models_of, tokenizer_of
from nanovllm_core.contracts import Accept, Batch, Refuse
from nanovllm_core.errors import ModelError, OptionError
from nanovllm_core.plan_model import plan_model
from nanovllm_core.testing import ModelContract
from nanovllm_core.training.export import export


class TestConv(ModelContract):
    component = Conv(hidden=24, kernel=3, dilations=(1, 3, 9))


class TestOneBlock(ModelContract):
    component = Conv(hidden=8, intermediate=20, kernel=2, dilations=(5,))
    vocab_size = 31


SMALL = {"use": "conv", "hidden": 24, "kernel": 3, "dilations": [1, 3, 9]}


def planned(**model):
    recipe = Recipe.from_data({"model": {**SMALL, **model}, "tokenizer": {"use": "bpe", "size": 300}})
    return plan_model(recipe, Registry.from_environment(), Machine(), training=False)


@pytest.fixture
def folder(tmp_path):
    """A model as a run exports it."""
    plan = planned()
    module = assemble(plan, "cpu", seed=1, training=False).module
    config = models_of(plan).config(shape=plan.shape)
    texts = ["the river runs past old mills", "and under a stone bridge"]
    export(tmp_path, module.named_parameters(), config, tokenizer_of(plan, lambda: texts), "float32")
    return tmp_path


def whole(tokens):
    n = len(tokens)
    return Batch(positions=torch.arange(n), lengths=(n,), cu_seqlens=torch.tensor([0, n], dtype=torch.int32))


def test_a_token_depends_on_as_many_tokens_as_the_config_says():
    plan = planned()
    module = assemble(plan, "cpu", seed=1, training=False).module
    reach = ConvConfig.from_json(models_of(plan).config(shape=plan.shape)).reach
    assert reach == 1 + 2 * (1 + 3 + 9)
    tokens = torch.randint(300, (reach + 5,), generator=torch.Generator().manual_seed(0))
    before = module(tokens, whole(tokens))
    tokens[4] = (tokens[4] + 1) % 300
    changed = (module(tokens, whole(tokens)) != before).any(1)
    assert changed.tolist() == [4 <= i < 4 + reach for i in range(len(tokens))]


def test_the_folder_opens_again_without_being_told_how(folder):
    llm = LLM(folder)
    assert llm.plan.model.entry.name == "conv"
    [answer] = llm.generate(["the river"], SamplingParams(temperature=0, max_tokens=40))
    tokens = torch.tensor([*llm.tokenizer.prefix_ids, *llm.tokenizer.encode(["the river"])[0]])
    for token in answer["token_ids"]:  # greedy, each step over the whole text: what the state must be equal to
        with torch.no_grad():
            assert int(llm.module(tokens, whole(tokens))[-1].argmax()) == token
        tokens = torch.cat([tokens, torch.tensor([token])])
    assert len(answer["token_ids"]) == 40
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nanovllm_conv"


def test_other_folders_and_broken_ones_are_refused(folder, tmp_path):
    assert isinstance(Conv(path=str(folder)).probe(), Accept)
    config = json.loads((folder / "config.json").read_text())
    for change, why in (
        ({"model_type": "llama"}, "opened here: 'nanovllm_conv'"),
        ({"dilations": []}, "dilations: got"),
        ({"conv_kernel": True}, "conv_kernel: got True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        answer = Conv(path=str(folder)).probe()
        assert isinstance(answer, Refuse)
        assert why in answer.why
        assert str(folder) in answer.why
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(ModelError, match=r"stored as .*, config\.json says"):
        Conv(path=str(folder)).shape(300)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": "x", "hidden": 9}, "belongs to a new model"),
        ({"dilations": []}, "empty list"),
        ({"dilations": [1, 0]}, "got 0, at least 1"),
        ({"kernel": 1}, "between 2 and 64"),
        ({"hidden": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_model(options, told):
    with pytest.raises(OptionError, match=told):
        planned(**{"use": "conv", **options}) if "path" not in options else plan_model(
            Recipe.from_data({"model": {"use": "conv", **options}}), Registry.from_environment(), Machine()
        )
