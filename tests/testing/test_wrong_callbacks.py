"""Callbacks that are wrong in one way each, told by the test that is there for it."""

from __future__ import annotations

import pytest
from attrs import define, field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.testing import CallbackContract, failures


@define
class State:
    runs: int = 0
    file: object = None


@frozen(kw_only=True, eq=False)
class Board:
    """Writes losses."""

    _state: State = field(factory=State, init=False)

    @hookimpl
    def run_started(self, plan):
        self._state.file = plan.output_dir / "board.txt"

    @hookimpl
    def step_done(self, step, metrics):
        with self._state.file.open("a") as file:
            file.write(f"{step} {metrics['loss']}\n")


class RaisesOnTheSecondRun(Board):
    """Board."""

    @hookimpl
    def run_started(self, plan):
        super().run_started(plan)
        self._state.runs += 1
        if self._state.runs > 1:
            raise RuntimeError("already started")


class RaisesWhenItGoesOn(Board):
    """Board."""

    @hookimpl
    def run_started(self, plan):
        super().run_started(plan)
        self._state.runs += 1

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        assert self._state.runs < 2 or done != 500_000 or phase == "reading"


class AnswersSomething(Board):
    """Board."""

    @hookimpl
    def note(self, text):
        return text


class NeedsTheNorm(Board):
    """Board."""

    @hookimpl
    def step_done(self, step, metrics):
        metrics["gradient_norm"] + 1


class CannotTellInfinity(Board):
    """Board."""

    @hookimpl
    def evaluated(self, step, metrics):
        int(metrics["eval_perplexity"])


class DividesByTheTotal(Board):
    """Board."""

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        done / total


class WritesHere(Board):
    """Board."""

    @hookimpl
    def generated(self, prompt, text):
        with open("answers.txt", "a") as file:
            file.write(text)


class ExpectsAnEvaluation(Board):
    """Board."""

    @hookimpl
    def evaluated(self, step, metrics):
        self._state.runs = 1

    @hookimpl
    def run_finished(self, output_dir):
        assert self._state.runs, "nothing was evaluated"


AGAIN = {
    "test_two_runs_in_one_process",
    "test_the_same_run_again",
    "test_a_run_that_breaks_off_and_goes_on",
    "test_on_every_rank",
}
WHOLE = {
    "test_a_whole_run", "test_figures_may_be_missing_or_new_or_infinite", "test_without_held_out_documents_or_prompts",
    "test_writes_nowhere_but_into_the_output_folder",
}  # fmt: skip
CALLBACKS = {
    Board: set(),
    RaisesOnTheSecondRun: AGAIN,
    RaisesWhenItGoesOn: AGAIN - {"test_the_same_run_again"},
    AnswersSomething: AGAIN | WHOLE,
    NeedsTheNorm: {"test_figures_may_be_missing_or_new_or_infinite"},
    CannotTellInfinity: {"test_figures_may_be_missing_or_new_or_infinite"},
    DividesByTheTotal: AGAIN | WHOLE,
    WritesHere: {"test_writes_nowhere_but_into_the_output_folder"},
    ExpectsAnEvaluation: {"test_without_held_out_documents_or_prompts"},
}


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda c: c.__name__)
def test_callbacks(cls):
    class Kit(CallbackContract):
        def make(self):  # a fresh one for each test
            self.component = self.component or cls()
            return self.component

    assert set(failures(Kit)) == CALLBACKS[cls]
