"""`generate.steps`: the prompts are answered during training, which does not notice."""

import json

import pytest
from safetensors.torch import load_file

from nanovllm_core import LLM, Machine, SamplingParams, hookimpl
from nanovllm_core.errors import GenerationError, Interrupted, RecipeError
from nanovllm_core.training.stop import StopRequest

EVERY = (
    "generate.steps=2",
    "generate.temperature=1",
    "generate.prompts=[The river, old]",
    "generate.repetition_penalty=1.1",
)


def samples(out):
    path = out / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def same(a, b):
    held, wanted = (load_file(out / "model.safetensors") for out in (a, b))
    return held.keys() == wanted.keys() and all(held[k].equal(wanted[k]) for k in wanted)


def figures(watch):
    return {k: (v["loss"], v["gradient_norm"]) for k, v in watch.steps.items()}, watch.evaluations


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("train.gradient_checkpointing=true", "train.spike_factor=9"),
        ("model.family=mistral", "train.unfreeze_blocks_every=2"),
        ("model.family=llama", "train.deterministic=true"),
    ],
)
def test_training_does_not_notice(go, sets):
    plain, heard = go("output_dir=plain", *sets)
    sampled, watch = go("output_dir=sampled", *sets, *EVERY)
    assert figures(watch) == figures(heard)
    assert same(sampled, plain)
    assert [(line["step"], line["prompt"]) for line in samples(sampled)] == [
        (step, prompt) for step in (2, 4, 6) for prompt in ("The river", "old")
    ]
    assert [line["step"] for line in samples(plain)] == [6]
    assert [n for n in watch.notes if n.startswith("what the model writes")] == [
        "what the model writes after step 2:", "what the model writes after step 4:",
    ]  # fmt: skip
    asked = SamplingParams(temperature=1, top_p=0.95, max_tokens=8, seed=42, repetition_penalty=1.1)
    for step in (4, 6):
        llm = LLM(sampled / f"checkpoint-{step}", machine=Machine())
        found = [line["text"] for line in samples(sampled) if line["step"] == step]
        assert found == [answer["text"] for answer in llm.generate(["The river", "old"], asked)]


def test_gpt2_and_a_model_without_a_cache(go, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 400}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model.save_pretrained(folder / "gpt2")
    out, _ = go("output_dir=vocabulary", "train.max_steps=1", "generate.prompts=[]")
    for path in out.glob("tokenizer*"):
        (folder / "gpt2" / path.name).write_bytes(path.read_bytes())
    for use in ("pretrained", "transformers"):
        sets = (f"model={{use: {use}, path: gpt2}}", "tokenizer=null")
        plain, heard = go(f"output_dir={use}1", *sets)
        sampled, watch = go(f"output_dir={use}2", *sets, *EVERY)
        assert figures(watch) == figures(heard)
        assert same(sampled, plain)
        assert len(samples(sampled)) == 6


def test_a_run_that_goes_on_tells_each_sample_once(go):
    unbroken, _ = go("output_dir=unbroken", *EVERY)
    stop = StopRequest()

    class Asks:
        @hookimpl
        def step_done(self, step):
            if step == 5:
                stop.ask()

    with pytest.raises(Interrupted):
        go(*EVERY, callbacks=[Asks()], stop=stop)
    (out, _) = go(*EVERY)
    assert same(out, unbroken)
    assert samples(out) == samples(unbroken)
    _, watch = go("generate.steps=3", "generate.prompts=[Other]")
    assert watch.said("this run is finished")
    assert samples(out) == samples(unbroken)


def test_who_asks_to_stop_does_not_wait_for_a_sample(go):
    stop = StopRequest()

    class Asks:
        @hookimpl
        def evaluated(self, step):
            if step == 2:
                stop.ask()

    with pytest.raises(Interrupted, match="goes on from checkpoint-2"):
        go(*EVERY, "generate.max_tokens=100000", callbacks=[Asks()], stop=stop)
    out, _ = go(*EVERY)
    assert {line["step"] for line in samples(out)} == {4, 6}


def test_a_sample_that_fails_does_not_end_the_training(go, monkeypatch):
    from nanovllm_core import samples as module

    real, calls = module.generate, []

    def failing(*asked, **options):
        calls.append(1)
        if len(calls) == 1:
            raise GenerationError("the model's logits are not finite")
        return real(*asked, **options)

    monkeypatch.setattr(module, "generate", failing)
    out, watch = go(*EVERY)
    assert watch.said("step 2: the prompts are not answered (the model's logits are not finite); the training goes on")
    assert {line["step"] for line in samples(out)} == {4, 6}


def test_several_ranks(several):
    assert several.run("output_dir=plain", "parallel=ddp").returncode == 0
    done = several.run("output_dir=ddp", "parallel=ddp", *EVERY)
    assert done.returncode == 0, done.stderr
    assert several.same("ddp", "plain")
    assert several.losses("ddp") == several.losses("plain")
    assert [line["step"] for line in samples(several.folder / "ddp")] == [2, 2, 4, 4, 6, 6]
    done = several.run("output_dir=fsdp", "parallel=fsdp", *EVERY)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in samples(several.folder / "fsdp")] == [6, 6]


def test_wrong_keys(go):
    for wrong, says in (
        ("generate.steps=-1", "generate.steps: got -1"),
        ("generate.min_p=1.5", "generate.min_p: got 1.5"),
        ("generate.repetition_penalty=0", "generate.repetition_penalty: got 0"),
        ("callbacks=[{use: metrics, file: samples.jsonl}]", "where the model's answers go"),
    ):
        with pytest.raises(RecipeError, match=says):
            go(wrong)
