"""Whole runs: what they leave behind, going on after an interruption, and making way for another run."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from nanovllm_core import LLM, Machine, SamplingParams, hookimpl
from nanovllm_core.errors import DataError, GenerationError, OutputError, RecipeError

KILLED = """
import os, signal, sys
from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan, run

class Kill:
    @hookimpl
    def checkpoint_saved(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe.load(sys.argv[1], sets=["output_dir=killed", "callbacks=[metrics]"])
run(make_plan(recipe, Registry.from_environment(), Machine()), callbacks=[Kill()])
"""


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(watch):
    return [watch.steps[s]["loss"] for s in sorted(watch.steps)]


def test_a_run_leaves_a_model_checkpoints_metrics_and_a_lock(go):
    out, watch = go()
    assert sorted(watch.steps) == [1, 2, 3, 4, 5, 6]
    assert losses(watch)[-1] < losses(watch)[0]
    assert sorted(watch.evaluations) == [0, 2, 3, 4, 6]  # every 3 steps, and of each checkpoint
    assert watch.evaluations[6]["eval_bits_per_byte"] < watch.evaluations[0]["eval_bits_per_byte"]
    assert watch.saved == [2, 3, 4, 6]  # 3: the best evaluation so far
    assert watch.answers["The river"]
    assert {"reading", "tokenising", "building the vocabulary"} <= watch.phases
    assert watch.said("1 files of kind .png are left out")
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "plan.lock.json",
        "metrics.jsonl",
        "checkpoint-6",
    } <= names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert {"learning_rate", "tokens_per_second"} <= lines[1].keys()
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 2, 3, 4, 6]
    lock = json.loads((out / "plan.lock.json").read_text())
    assert lock["components"]["model"]["use"] == "nanovllm/preset"
    assert lock["versions"]["torch"] == torch.__version__


def test_the_result_opens_in_transformers_with_the_same_logits_and_text(go):
    out, _ = go()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    llm = LLM(out)
    prompt = "The river runs past"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == [*llm.tokenizer.prefix_ids, *llm.tokenizer.encode([prompt])[0]]
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0]
    assert ours["token_ids"] == theirs[: len(ours["token_ids"])]
    from nanovllm_core.contracts import Batch

    length = ids.shape[1]
    batch = Batch(
        positions=torch.arange(length), lengths=(length,), cu_seqlens=torch.tensor([0, length], dtype=torch.int32)
    )
    with torch.no_grad():
        torch.testing.assert_close(llm.module(ids[0], batch), model(ids).logits[0], rtol=0, atol=1e-4)


def test_the_same_run_again_changes_nothing_and_says_so(go):
    out, _ = go()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "plan.lock.json"}
    out, watch = go()
    assert watch.said("this run is finished (6 steps)")
    assert watch.steps == {}
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("kept", ["checkpoint-2", "checkpoint-4"])
def test_resuming_is_bit_for_bit_the_unbroken_run(go, kept):
    out, whole = go("train.save_total_limit=9")
    want = weights(out)
    for path in out.glob("checkpoint-*"):
        if path.name > kept:
            shutil.rmtree(path)
    (out / "config.json").unlink()
    out, rest = go()
    assert rest.said(f"going on from {kept}")
    assert losses(rest) == losses(whole)[int(kept[-1]) :]
    assert same(weights(out), want)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on_to_the_same_weights(go, folder):
    """SIGKILL to a real process some step after its first checkpoint, as soon as that is whole."""
    out, whole = go()
    want = weights(out)
    done = subprocess.run([sys.executable, "-c", KILLED, folder / "recipe.yaml"], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (folder / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    out, watch = go("output_dir=killed")
    assert watch.said("going on from checkpoint-2")
    assert losses(watch) == losses(whole)[2:]
    assert same(weights(out), want)


def test_more_epochs_go_on_and_the_schedule_is_laid_out_anew(go):
    go()
    _, watch = go("train.max_steps=9")
    assert watch.said("going on from checkpoint-6")
    assert watch.said("laid out anew over 9 steps (it was 6)")
    assert sorted(watch.steps) == [7, 8, 9]


def test_another_run_moves_the_old_contents_aside(go, folder):
    out, _ = go()
    old = weights(out)
    out, watch = go("train.seed=7")
    assert watch.said("previous/1")
    assert same(weights(out / "previous" / "1"), old)
    assert not same(weights(out), old)
    (folder / "docs" / "one.json").write_text('{"text": "changed"}')
    go("train.seed=7")
    assert (out / "previous" / "2" / "plan.lock.json").exists()


def test_logging_and_saving_are_not_part_of_the_identity(go):
    go()
    _, watch = go("train.logging_steps=3", "train.save_steps=5", "generate.max_tokens=3")
    assert watch.said("this run is finished")


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(go):
    out, whole = go()
    (out / "config.json").unlink()
    content = bytearray((out / "checkpoint-6" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "checkpoint-6" / "model.safetensors").write_bytes(content)
    _, watch = go()
    assert watch.said("checkpoint-6 is damaged (model.safetensors has changed since it was written)")
    assert watch.said("going on from checkpoint-4")
    assert losses(watch) == losses(whole)[4:]


def test_accumulation_does_not_change_the_loss(go):
    _, a = go("output_dir=a")
    _, b = go("output_dir=b", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1")
    _, c = go("output_dir=c", "train.per_device_train_batch_size=1", "train.global_batch_size=4")
    assert losses(b) == pytest.approx(losses(a), rel=1e-5)
    assert losses(c) == pytest.approx(losses(a), rel=1e-5)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_compute_learns_too_and_emulation_is_said(go, has):
    _, watch = go("train.mixed_precision=bf16", machine=Machine(bf16=has))
    assert losses(watch)[-1] < losses(watch)[0]
    assert watch.said("no bf16 instructions") is not has


def test_concatenated_documents(go):
    _, watch = go("data.concatenate_documents=true")
    assert losses(watch)[-1] < losses(watch)[0]


def test_a_single_document_turns_evaluation_off_and_says_so(go):
    _, watch = go("data.path=docs/one.json")
    assert watch.said("evaluation is off: a single document is not split")
    assert watch.evaluations == {}


def test_fine_tuning_our_own_model_goes_on_where_it_was(go):
    _, first = go()
    tuned = ("model={use: pretrained, path: out}", "tokenizer=auto", "output_dir=tuned", "data.eval_fraction=0.2")
    out2, second = go(*tuned)
    assert second.evaluations[0]["eval_loss"] == pytest.approx(first.evaluations[6]["eval_loss"], rel=1e-4)
    assert json.loads((out2 / "config.json").read_text())["vocab_size"] == 400


def test_a_reader_and_a_callback_from_memory(go):
    from attrs import frozen

    from nanovllm_core.contracts import Accept, Record, Refuse

    @frozen(kw_only=True, eq=False)
    class Memory:
        """Documents from memory."""

        @hookimpl
        def probe(self, source):
            return Accept() if source.path == "memory:" else Refuse("not mine")

        @hookimpl
        def read(self, source):
            return iter(
                [Record(value=f"document {i} of the river and the mill", source="memory", index=i) for i in range(30)]
            )

    out, watch = go("data.path='memory:'", "data.readers=memory", readers={"memory": Memory})
    assert watch.said("30 documents")
    assert (out / "model.safetensors").exists()


def test_two_runs_do_not_write_into_one_folder(go, folder):
    from nanovllm_core.output import claimed

    with claimed(folder / "out"), pytest.raises(OutputError, match="another run is writing there"):
        go()
    go()


def test_what_cannot_be_run_is_said(go, folder):
    with pytest.raises(RecipeError, match=r"data\.path is missing"):
        go("data.path=null")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        go("data.path=nowhere")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(OutputError, match=r"thesis\.doc .* name another folder"):
        go("output_dir=mine")
    with pytest.raises(RecipeError, match="at most 4096"):
        go("data.max_seq_length=5000")
    with pytest.raises(GenerationError, match="too many: prompt and answer share 4096 positions"):
        go("output_dir=long", f"generate.prompts={'the river ' * 4096}")
    assert not list((folder / "long").glob("checkpoint-*"))
    (folder / "docs" / "bad.jsonl").write_text('{"text": "fine"}\n{"text": }\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2:"):
        go()


COARSE = ("train.mixed_precision=bf16", "train.master_weights=false")


def test_bf16_weights_train_and_go_on_bit_for_bit(go):
    from safetensors.torch import load_file

    _, exact = go("train.mixed_precision=bf16", "output_dir=exact")
    out, whole = go(*COARSE)
    assert max(abs(a - b) for a, b in zip(losses(whole), losses(exact), strict=True)) < 0.02 * losses(exact)[0]
    assert losses(whole)[-1] < losses(whole)[0]
    _, other = go(*COARSE, "output_dir=exact")  # is another run
    assert losses(other) == losses(whole)
    for file in ("model.safetensors", "optimizer.safetensors"):
        held = load_file(out / "checkpoint-4" / file)
        assert {x.dtype for name, x in held.items() if not name.startswith("step:")} == {torch.bfloat16}
    assert json.loads((out / "checkpoint-4" / "config.json").read_text())["dtype"] == "bfloat16"
    want = weights(out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "config.json").unlink()
    out, rest = go(*COARSE)
    assert rest.said("going on from checkpoint-4")
    assert losses(rest) == losses(whole)[4:]
    assert same(weights(out), want)
    with pytest.raises(
        RecipeError, match=r"train\.master_weights: false trains weights in bf16, and here is computed in float32"
    ):
        go("train.mixed_precision=fp32", "train.master_weights=false")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_weights_on_several_ranks(several, go, strategy):
    few = (*COARSE, "train.max_steps=3", "data.eval_fraction=0")
    _, alone = go(*several.TRAIN, *few, "output_dir=alone")
    done = several.run(*few, f"parallel={strategy}")
    assert done.returncode == 0, done.stderr
    found = [loss for _, loss in sorted(several.losses().items())]
    assert max(abs(a - b) for a, b in zip(found, losses(alone), strict=True)) < 0.01 * found[0]
