"""The callback, by nano-vllm's conformance kit; then what TensorBoard reads of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from nanovllm_tensorboard.component import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanovllm_core.testing import CallbackContract


class TestTensorBoard(CallbackContract):
    component = TensorBoard()


def plan(folder: Path, rank: int = 0):
    """What the callback uses of a plan."""
    return SimpleNamespace(output_dir=folder, machine=SimpleNamespace(rank=rank))


def tell(callback, folder, steps):
    callback.run_started(plan(folder))
    for step in steps:
        callback.step_done(step, {"loss": 4.0 - step / 8, "learning_rate": 1e-3, "total_steps": 9})
        callback.evaluated(step, {"eval_loss": 3.0})
    callback.generated("The river", " runs")
    callback.run_finished(folder)


def test_tensorboard_reads_what_a_run_and_its_resumption_told(tmp_path):
    tell(TensorBoard(), tmp_path, range(1, 7))  # killed after its checkpoint at 4,
    tell(TensorBoard(), tmp_path, range(5, 9))  # and resumed there
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(i, 4.0 - i / 8) for i in range(1, 9)]
    assert {e.value for e in events.Scalars("eval/loss")} == {3.0}
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "eval/loss"}
    assert events.Tags()["tensors"] == ["generated/The river/text_summary"]


@pytest.mark.parametrize("rank", [1, 2])
def test_other_ranks_write_nothing(tmp_path, rank):
    callback = TensorBoard(folder="board")
    callback.run_started(plan(tmp_path, rank))
    callback.step_done(1, {"loss": 1.0})
    callback.run_finished(tmp_path)
    assert list(tmp_path.iterdir()) == []
