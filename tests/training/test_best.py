"""Early stopping: how long it waits, what counts as better, and what a checkpoint keeps of it."""

import json
import math

import pytest
from attrs import asdict

from nanovllm_core.errors import TrainingError
from nanovllm_core.training.best import Best, Patience


def heard(losses, min_delta=0.0):
    best, waits = Best(), []
    for i, loss in enumerate(losses, 1):
        best.hear(i * 10, loss, min_delta)
        waits.append(best.waited)
    return best, waits


def test_evaluations_without_a_better_one_are_counted():
    best, waits = heard([3.0, 2.0, 2.5, 2.0, math.nan, 1.9, 2.0])
    assert waits == [0, 0, 1, 2, 3, 0, 1]
    assert (best.step, best.eval_loss) == (60, 1.9)
    assert best.exhausted(Patience(evaluations=1))
    assert not best.exhausted(Patience(evaluations=2))
    assert not best.exhausted(None)


def test_small_steps_down_count_once_they_add_up():
    best, waits = heard([3.0, 2.95, 2.9, 2.85], min_delta=0.1)
    assert waits == [0, 1, 2, 0]
    assert (best.step, best.eval_loss) == (40, 2.85)
    assert Best(**json.loads(json.dumps(asdict(best)))) == best


@pytest.fixture
def worsening(tiny):
    """A run whose held-out loss can only rise: it is trained on noise and measured on what it knows best."""

    def make(heard, patience=2, **changes):
        documents = tiny.random_documents(seed=21, steps=40)
        known = [tiny.micro_batch(pairs) for pairs in tiny.random_documents(seed=22, steps=1)[0]]
        return tiny.trainer(
            documents, heard, tiny.evaluation(known), total=40, kind="constant", learning_rate=1e-2, eval_steps=2,
            patience=Patience(evaluations=patience, min_delta=0.5), **changes,
        )  # fmt: skip

    return make


def test_the_run_ends_says_so_and_saves(tiny, worsening):
    heard, saved = tiny.Heard(), []
    trainer = worsening(heard)
    trainer.run(lambda t: saved.append((t.step, t.progress())))
    losses = {step: m["eval_loss"] for step, m in heard.evaluations.items() if step}
    assert trainer.step < 40
    assert trainer.step == max(losses)
    assert saved[-1][0] == trainer.step
    assert saved[-1][1]["best"]["step"] == min(losses, key=losses.get)
    assert "without a better eval_loss (train.early_stopping_patience)" in heard.notes[-1]
    again = worsening(tiny.Heard())
    again.step = trainer.step
    again.resume(json.loads(json.dumps(saved[-1][1])), longer=False)
    again.run(pytest.fail)  # stopped before: nothing is left to do
    again.resume(saved[-1][1], longer=True)
    assert not again.best.exhausted(again.settings.patience)


def test_without_evaluation_there_is_nothing_to_stop_by(tiny):
    with pytest.raises(TrainingError, match=r"train\.early_stopping_patience: nothing is evaluated"):
        tiny.trainer([], patience=Patience(evaluations=1))
