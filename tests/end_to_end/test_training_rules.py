"""Whole runs by the recipe's rules: freezing, schedules, bad steps, early stopping; resumed, and as the same run or another."""

import json
import math
import shutil

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Refuse
from nanovllm_core.errors import NanoError, RecipeError

SKIP = ("train.on_bad_step=skip", "train.max_bad_steps=2")


@frozen(kw_only=True, eq=False)
class Poisoned:
    """The torch kernels' embedding, but the micro-batch that `calls` counts to is infinite."""

    calls: list
    bad: frozenset

    @hookimpl
    def probe(self, request):
        return Accept(9, "for the test") if request.operation == "embedding" else Refuse("embedding only")

    @hookimpl
    def load(self, request):
        def embed(ids, weight):
            x = torch.nn.functional.embedding(ids, weight)
            if not torch.is_grad_enabled():  # evaluation and generation
                return x
            self.calls.append(1)
            return x * math.inf if len(self.calls) in self.bad else x

        return embed


def poison(*micro_batches):
    return {"poisoned": Poisoned(calls=[], bad=frozenset(micro_batches))}


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


RULES = (
    "train.unfreeze=[{at: 0.5, parameters: ['model.layers.3.*']}]", "train.freeze=model.layers.0.*",
    "train.gradient_checkpointing=true", "train.lr_scheduler_type=wsd", "train.decay_ratio=0.4",
    "train.warmup_steps=null", "train.warmup_ratio=0.2", "train.save_total_limit=10",
)  # fmt: skip


@pytest.mark.parametrize("kept", ["checkpoint-2", "checkpoint-4"])
def test_a_resume_under_all_rules_is_bit_for_bit_the_unbroken_run(go, kept):
    out, whole = go(*RULES)
    want = weights(out)
    assert whole.said("step 4: 11 parameters thaw")
    assert [whole.steps[s]["learning_rate"] for s in (2, 3, 4)] == pytest.approx([2e-3] * 3)
    assert whole.steps[6]["learning_rate"] == pytest.approx(2e-3 * (1 - math.sqrt(1 / 2)))
    for path in out.glob("checkpoint-*"):
        if path.name > kept:
            shutil.rmtree(path)
    (out / "finished.json").unlink()
    out, rest = go(*RULES)
    assert rest.said(f"going on from {kept}")
    assert same(weights(out), want)
    table = json.loads((out / "evaluation.json").read_text())
    assert table["step"] == 6
    assert {"source", "tokens", "loss", "perplexity", "bits_per_byte"} == set(table["sources"][0])


def test_the_best_model_is_kept_wherever_its_evaluation_falls(go):
    out, watch = go(
        "train.eval_steps=1", "train.save_steps=1000", "train.save_total_limit=1", "train.learning_rate=0.5",
        "train.warmup_steps=5", "train.lr_scheduler_type=constant",
    )  # fmt: skip
    losses = {step: m["eval_loss"] for step, m in watch.evaluations.items() if step}
    best = min(losses, key=losses.get)
    assert 0 < best < 6
    pointers = json.loads((out / "checkpoints.json").read_text())
    assert pointers == {"latest": "checkpoint-6", "best": f"checkpoint-{best}", "best_eval_loss": losses[best]}
    held = load_file(out / f"checkpoint-{best}" / "model.safetensors")
    assert same(weights(out / "best"), held)
    assert not same(weights(out), held)


def test_checkpointing_and_rules_for_bad_steps_are_the_same_run_and_freezing_is_not(go):
    out, _ = go()
    for rule in ("train.gradient_checkpointing=true", *SKIP, "train.save_steps=3"):
        _, watch = go(rule)
        assert watch.said("this run is finished (6 steps)")
    _, watch = go("train.freeze=model.layers.0.*", "train.max_steps=1")
    assert watch.said("another data, tokenizer, model or training than the last time")
    assert weights(out)["model.layers.0.mlp.up_proj.weight"].isfinite().all()


def test_a_run_that_stopped_at_a_bad_step_goes_on_and_skips_it(go):
    """Two micro-batches a step: the sixth is the last of step 3."""
    with pytest.raises(
        NanoError, match=r"step 3: the loss is nan .* its documents: \S+\.\w+.*train\.on_bad_step: skip"
    ):
        go(kernels=poison(6))
    out, watch = go(*SKIP, kernels=poison(2))  # from checkpoint-2: step 3 again
    assert watch.said("going on from checkpoint-2")
    assert watch.said("step 3: the loss is nan")
    assert sorted(watch.steps) == [4, 5, 6]
    assert watch.steps[6]["skipped_steps"] == 1
    went_on = weights(out)
    out, _ = go(*SKIP, "output_dir=whole", kernels=poison(6))
    assert same(weights(out), went_on)
    state = json.loads((out / "checkpoint-4" / "state.json").read_text())
    assert state["progress"]["guard"]["skipped"] == 1


EARLY = (
    "train.early_stopping_patience=1",
    "train.early_stopping_min_delta=50",
    "train.eval_steps=2",
    "train.max_steps=20",
)


def test_a_run_that_stops_early_is_finished_and_a_longer_one_goes_on(go):
    out, watch = go(*EARLY)
    assert max(watch.steps) == 4
    assert watch.said("stopping after 4 of 20 steps: 1 evaluations without a better eval_loss")
    assert watch.saved[-1] == 4
    _, watch = go(*EARLY)
    assert watch.said("this run is finished (4 steps)")
    (out / "finished.json").unlink()  # as a kill before the export leaves it
    _, watch = go(*EARLY)
    assert watch.steps == {}
    assert watch.answers["The river"]
    _, watch = go(*EARLY, "train.max_steps=40")
    assert watch.said("going on from checkpoint-4")
    assert sorted(watch.steps) == [5, 6]
    state = json.loads((out / "checkpoint-6" / "state.json").read_text())
    assert state["progress"]["best"]["step"] in (2, 4, 6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.warmup_ratio=0.1", r"train\.warmup_ratio: got 0\.1 beside warmup_steps 1; give one of the two"),
        (
            "train.decay_ratio=0.1",
            r"train\.decay_ratio: got 0\.1, which lr_scheduler_type cosine has no use for; wsd has",
        ),
        ("train.freeze=[model.layers.9.*]", r"train\.freeze: 'model\.layers\.9\.\*' matches no parameter"),
        ("train.unfreeze=[{at: 1.5, parameters: [a]}]", r"train\.unfreeze\[0\]\.at: got 1\.5, allowed: a step \(1, 2"),
        ("train.unfreeze_blocks_every=0", r"train\.unfreeze_blocks_every: got 0, allowed: a step"),
        ("train.spike_factor=1", r"train\.spike_factor: got 1\.0, above 1"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_read(go, folder, setting, message):
    with pytest.raises(RecipeError, match=message):
        go(setting)
    assert not (folder / "out").exists()
