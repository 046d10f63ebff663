"""A recipe with the `transformers` model: trained, resumed, exported under its own names, and it answers."""

import pytest
import torch
from attrs import frozen

from nanovllm_core import LLM, Machine, Recipe, Registry, SamplingParams, hookimpl, make_plan
from nanovllm_core.contracts import Accept, Layout
from nanovllm_core.errors import RefusedError
from nanovllm_core.explain import explain

OPTIONS = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "hidden_dropout": 0.1, "attention_dropout": 0.0,
}  # fmt: skip


@pytest.fixture
def base(folder):
    """A random GPT-NeoX: transformers stores its output layer under another name than it runs it with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **OPTIONS)).save_pretrained(folder / "base")
    return "model={use: transformers, path: base}"


def test_trained_resumed_and_opened_by_transformers(go, folder, base):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Stop(Exception):
        pass

    class StopAfter:
        @hookimpl
        def checkpoint_saved(self, step):
            if step == 4:
                raise Stop

    unbroken, watch = go(base, "output_dir=unbroken")
    with pytest.raises(Stop):
        go(base, callbacks=[StopAfter()])
    out, again = go(base)
    assert again.said("going on from checkpoint-4")
    resumed, whole = (load_file(f / "model.safetensors") for f in (out, unbroken))
    assert "embed_out.weight" in resumed
    assert all(resumed[name].equal(whole[name]) for name in whole)
    assert watch.evaluations[6]["eval_loss"] < watch.evaluations[0]["eval_loss"]

    opened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompts = ["The river runs past", "mill"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    llm = LLM(out, machine=Machine())
    assert llm.plan.model.entry.name == "transformers"
    for prompt, answer in zip(
        prompts, llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12)), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        greedy = opened.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert answer["token_ids"] == greedy


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_second_run_in_one_process_begins_from_the_same_weights(go, folder, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in OPTIONS.items() if k != "hidden_dropout"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(folder / "base")
    use = "pretrained" if kind == "llama" else "transformers"
    first, second = (go(f"model={{use: {use}, path: base}}", f"output_dir={name}")[1] for name in ("one", "two"))
    assert first.evaluations == second.evaluations
    assert first.steps[6]["loss"] == second.steps[6]["loss"]


def test_what_it_cannot_do_is_told_and_refused(folder, base):
    @frozen(kw_only=True, eq=False)
    class Splits:
        """Claims to split any model in two."""

        @hookimpl
        def probe(self, request):
            return Accept(layout=Layout(tensor=2))

        @hookimpl
        def parallelize(self, module, layout, mesh):
            raise AssertionError("never reached")

    registry = Registry.from_environment().extended(parallel={"splits": Splits})
    plan = make_plan(Recipe.load(folder / "recipe.yaml", sets=[base]), registry, Machine())
    told = explain(plan)
    for limit in ("no packing: ", "no cache: ", "no tensor: "):
        assert limit in told
    with pytest.raises(RefusedError, match="parallel: splits refuses: the model cannot be split"):
        make_plan(Recipe.load(folder / "recipe.yaml", sets=[base, "parallel=splits"]), registry, Machine())
