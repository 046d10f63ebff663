"""Bad steps touch nothing: weights, moments and the count of steps in AdamW stay bit for bit as they were."""

import copy
import json
import math

import pytest
import torch
from attrs import evolve

from nanovllm_core.contracts import IGNORE
from nanovllm_core.errors import TrainingError
from nanovllm_core.training.guard import ENOUGH, BadSteps, Guard

POISON = 299  # a token whose embedding makes the loss infinite
SKIP = BadSteps(skip=True, in_a_row=3)


def poisoned(tiny, where, steps=8):
    """Documents without the poison but for `where`: step -> micro-batch."""
    documents = tiny.random_documents(seed=4, steps=steps, micro_batches=(2, 3, 2))
    clean = [[[(t.clamp(max=POISON - 1), y.clamp(max=POISON - 1)) for t, y in m] for m in step] for step in documents]
    for step, micro in where.items():
        tokens, targets = clean[step][micro][-1]
        clean[step][micro][-1] = (torch.full_like(tokens, POISON), targets.masked_fill(targets == IGNORE, 1))
    return clean


def trainer_of(tiny, documents, heard=None, value=math.inf, **changes):
    """Untied, so that the poison is met only where it is read."""
    model = tiny.model()
    embedding = model.module.model.embed_tokens
    inner = model.module.ops.embedding

    def embed(ids, weight):
        return torch.where((ids == POISON)[:, None], inner(ids, weight) * 0 + value, inner(ids, weight))

    ops = evolve(model.module.ops, embedding=embed)
    for part in model.module.modules():
        if hasattr(part, "ops"):
            part.ops = ops
    assert embedding.weight.isfinite().all()
    return tiny.trainer(documents, heard, model=model, total=len(documents), **changes)


def snapshot(trainer):
    parameters = list(trainer.model.module.parameters())
    states = {i: trainer.optimizer.state[p] for i, p in enumerate(parameters) if p in trainer.optimizer.state}
    return [p.detach().clone() for p in parameters], copy.deepcopy(states)


def same(a, b):
    """Weights, moments and counts; moments that are not there are zero."""
    kept = [
        (state[1].get(i, {}).get(key))
        for state in (a, b)
        for i in a[1] | b[1]
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    pairs = zip(kept[: len(kept) // 2], kept[len(kept) // 2 :], strict=True)
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and all(
        torch.equal(torch.zeros_like(y) if x is None else x, torch.zeros_like(x) if y is None else y)
        for x, y in pairs
        if x is not None or y is not None
    )


@pytest.mark.parametrize("micro", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_bad_micro_batch_stops_the_run_and_names_its_documents(tiny, micro, value):
    trainer, states = trainer_of(tiny, poisoned(tiny, {2: micro}), value=value, save_steps=1), []
    with pytest.raises(
        TrainingError, match=r"step 3: the loss is nan .*step2-document0\.txt, .*train\.on_bad_step: skip"
    ):
        trainer.run(lambda t: states.append(snapshot(t)))
    assert len(states) == 2
    assert same(states[-1], snapshot(trainer))
    assert all(p.grad is None for p in trainer.model.module.parameters())


@pytest.mark.parametrize("micro", [0, 2], ids=["first", "last"])
def test_a_skipped_step_leaves_everything_as_it_was_and_is_counted(tiny, micro):
    heard, states = tiny.Heard(), {}
    trainer = trainer_of(tiny, poisoned(tiny, {2: micro, 5: 1}), heard, save_steps=1, bad_steps=SKIP)
    trainer.run(lambda t: states.update({t.step: snapshot(t)}))
    assert trainer.step == 8
    assert same(states[2], states[3])
    assert same(states[5], states[6])
    assert not same(states[3], states[4])
    assert sorted(heard.steps) == [1, 2, 4, 5, 7, 8]
    assert heard.steps[8]["skipped_steps"] == 2
    assert [note.split(":")[0] for note in heard.notes] == ["step 3", "step 6"]
    assert heard.notes[1].endswith("skipped (2 so far)")
    assert all(math.isfinite(m["loss"]) for m in heard.steps.values())


def test_too_many_in_a_row_stop_the_run(tiny):
    documents = poisoned(tiny, {1: 0, 2: 1, 4: 0, 5: 2, 6: 0})
    heard = tiny.Heard()
    trainer = trainer_of(tiny, documents, heard, bad_steps=SKIP)
    with pytest.raises(TrainingError, match=r"step 7: .* 3 bad steps in a row \(train\.max_bad_steps\)"):
        trainer.run(lambda t: None)
    assert len(heard.notes) == 4


def test_a_broken_gradient_under_a_finite_loss_is_caught(tiny):
    trainer = tiny.trainer(tiny.random_documents(seed=4))
    trainer.model.module.get_parameter("model.norm.weight").register_hook(lambda grad: grad * math.nan)
    before = snapshot(trainer)
    with pytest.raises(TrainingError, match=r"step 1: the loss is 5.* and the gradient norm nan"):
        trainer.run(lambda t: None)
    assert same(before, snapshot(trainer))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad_under_a_finite_norm(loss):
    """As where the loss of one micro-batch overflows in its sum alone, and no gradient does."""
    for rule in (BadSteps(), BadSteps(skip=True, spike_factor=3.0)):
        guard = Guard(rule)
        assert [guard.accept(2.0, 1.0) for _ in range(ENOUGH)] == [""] * ENOUGH
        assert guard.accept(loss, 1.0) == f"the loss is {loss} and the gradient norm 1.0"
        assert (guard.skipped, guard.row, list(guard.losses)) == (1, 1, [2.0] * ENOUGH)
        assert guard.accept(2.0, 1.0) == ""
        assert (guard.skipped, guard.row) == (1, 0)


def test_a_spike_is_judged_by_the_median_which_it_does_not_move():
    guard = Guard(BadSteps(skip=True, spike_factor=3.0))
    usual = [2.0, 2.2, 1.8]
    assert not any(guard.accept(usual[i % 3], 1.0) for i in range(ENOUGH - 1))
    assert guard.accept(50.0, 1.0) == ""  # too early to judge
    for _ in range(5):
        assert "more than 3 times 2, the median" in guard.accept(6.1, 1.0)
    assert guard.accept(5.9, 1.0) == ""
    assert (guard.skipped, guard.row) == (5, 0)
    assert Guard(BadSteps()).accept(1e30, 1.0) == ""


def test_a_resumed_guard_goes_on_as_it_was(tiny):
    rule = BadSteps(skip=True, spike_factor=1.5)
    trainer = tiny.trainer([], bad_steps=rule)
    for loss in [2.0] * 20 + [9.0, 2.5]:
        trainer.guard.accept(loss, 1.0)
    other = tiny.trainer([], bad_steps=rule)
    other.resume(json.loads(json.dumps(trainer.progress())), longer=False)
    assert other.progress() == trainer.progress()
    assert other.guard.accept(3.1, 1.0) == trainer.guard.accept(3.1, 1.0) != ""
