"""Checkpoints written beside training: whole, in order, the newest and the best kept, errors heard."""

import json
import threading
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from nanovllm_core.errors import OutputError
from nanovllm_core.files import damage
from nanovllm_core.training import checkpoint, parts, saver
from nanovllm_core.training.optimizer import adamw
from nanovllm_core.training.saver import Saver, room_needed


@pytest.fixture
def training():
    """A small model that has taken a step, and its optimizer."""
    torch.manual_seed(2)
    model = torch.nn.Linear(5, 3)
    optimizer = adamw(model.named_parameters(), learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.update()
    return model, optimizer


@pytest.fixture
def make(tmp_path, training):
    """(options) -> a saver, what it has told, and a function that saves a step with a held-out loss."""

    def make(limit=2, write_rest=lambda folder: None, free=lambda: 0, resumed=None):
        told = []
        made = Saver(
            root=tmp_path, limit=limit, write_rest=write_rest, saved=lambda step, path: told.append((step, path.name)),
            free=free, resumed=resumed,
        )  # fmt: skip

        def save(step, loss=None, evaluated=True):
            model, optimizer = training
            metrics = {} if loss is None else {"eval_loss": loss}
            state = checkpoint.State(
                step=step, position=step, total_steps=9, identity="a", tokenizer="b", metrics=metrics, before={},
                random=[checkpoint.random_state()], evaluated=evaluated,
            )  # fmt: skip
            named = list(model.named_parameters())
            made.save(state, lambda copy: parts.snapshot(named, optimizer, copy), size=1000)

        return made, told, save

    return make


def names(root):
    return sorted(p.name for p in root.glob("checkpoint-*"))


def test_what_training_changes_meanwhile_is_not_saved(tmp_path, make, training):
    go_on = threading.Event()
    made, told, save = make(write_rest=lambda folder: go_on.wait(30))
    before = {n: p.detach().clone() for n, p in training[0].named_parameters()}
    moment = training[1].state[training[0].weight]["exp_avg"].clone()
    save(1)
    assert made.busy
    with torch.no_grad():
        training[0].weight.fill_(7.0)
        training[1].state[training[0].weight]["exp_avg"].fill_(7.0)
    made.poll()
    assert told == []
    go_on.set()
    made.finish()
    assert told == [(1, "checkpoint-1")]
    held = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(held[n], before[n]) for n in before)
    assert torch.equal(load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")["exp_avg:weight"], moment)


def test_the_next_save_waits_for_the_one_before(tmp_path, make):
    made, told, save = make()
    for step in (1, 2):
        save(step)
    assert (1, "checkpoint-1") in told
    made.finish()
    assert told == [(1, "checkpoint-1"), (2, "checkpoint-2")]


def test_the_pointers_move_when_the_checkpoint_is_whole_and_not_before(tmp_path, make):
    pointers, seen = tmp_path / "checkpoints.json", []

    def look(folder):
        seen.append(json.loads(pointers.read_text())["latest"] if pointers.exists() else None)

    made, _, save = make(write_rest=look, limit=1)
    for step in (1, 2, 3):
        save(step)
        made.finish()
    assert seen == [None, "checkpoint-1", "checkpoint-2"]
    assert json.loads(pointers.read_text())["latest"] == "checkpoint-3"


def test_newest_best_and_resumed_are_kept(tmp_path, make):
    made, _, save = make(limit=2)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.4), (5, 2.3)):
        save(step, loss)
    made.finish()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    told = json.loads((tmp_path / "checkpoints.json").read_text())
    assert told == {"latest": "checkpoint-5", "best": "checkpoint-2", "best_eval_loss": 2.0}
    made, _, save = make(limit=1, resumed=tmp_path / "checkpoint-4")  # another process goes on
    assert (made.best, made.best_loss) == ("checkpoint-2", 2.0)
    save(6, 1.0, evaluated=False)  # figures of an older step make no best
    made.finish()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    save(7, 1.9)
    made.finish()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-7"]
    assert all(damage(tmp_path / name) is None for name in names(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_of_equal_losses_the_earlier_is_the_best_also_for_who_goes_on(tmp_path, make):
    made, _, save = make(limit=None)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0)):
        save(step, loss)
    made.finish()
    assert made.best == "checkpoint-2"
    made, *_ = make(limit=None, resumed=tmp_path / "checkpoint-3")
    assert (made.best, made.best_loss) == ("checkpoint-2", 2.0)
    made, *_ = make(limit=None, resumed=tmp_path / "checkpoint-1")  # later ones will be made again
    assert made.best == "checkpoint-1"


def test_a_damaged_newer_one_takes_no_sound_one_s_place(tmp_path, make):
    made, _, save = make(limit=2)
    for step, loss in ((1, 2.0), (2, 3.0), (8, 3.0), (9, 3.0)):
        save(step, loss)
    made.finish()
    for name in ("checkpoint-8", "checkpoint-9"):
        (tmp_path / name / "state.json").unlink()
    made, _, save = make(limit=2, resumed=tmp_path / "checkpoint-1")
    for step in (3, 4, 5):
        save(step, 3.0)
    made.finish()
    assert {"checkpoint-1", "checkpoint-4", "checkpoint-5"} <= set(names(tmp_path))
    assert "checkpoint-3" not in names(tmp_path)


def test_no_limit_keeps_all(tmp_path, make):
    made, _, save = make(limit=None)
    for step in range(1, 6):
        save(step, 1.0)
    made.finish()
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize("look", ["poll", "finish", "save"])
def test_what_goes_wrong_is_heard_at_the_next_look(tmp_path, make, look):
    made, told, save = make(write_rest=lambda folder: (folder / "no" / "such").write_text(""))
    save(1)
    made._thread.join()
    with pytest.raises(OutputError, match="checkpoint-1: cannot be written"):
        save(2) if look == "save" else getattr(made, look)()
    assert told == []
    assert names(tmp_path) == []
    made.finish()  # heard once


def test_training_waits_where_a_copy_does_not_fit(make):
    made, told, save = make(free=lambda: 1200)
    save(1)
    assert told == [(1, "checkpoint-1")]
    assert not made.busy


def test_a_pruned_folder_that_a_kill_left_half_removed_never_shows(tmp_path, make):
    made, _, save = make()
    save(1, 1.0)
    made.finish()
    gone = tmp_path / ".checkpoint-0.gone"
    gone.mkdir()
    (gone / "model.safetensors").write_bytes(b"x")
    assert checkpoint.newest(tmp_path, pytest.fail)[1].step == 1
    assert not gone.exists()


def test_a_disk_that_cannot_hold_the_run_is_told_before_its_first_step(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: usage(free=50))
    room_needed(tmp_path, size=10, exported=5, limit=2, saves=9)  # (3 + 1) * 10 + 2 * 5
    with pytest.raises(OutputError, match=r"0\.0 GB are free.*lower train\.save_total_limit \(now 2\)"):
        room_needed(tmp_path, size=11, exported=5, limit=2, saves=9)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"x" * 10)  # will make room
    room_needed(tmp_path, size=11, exported=5, limit=2, saves=9)
    room_needed(tmp_path, size=11, exported=5, limit=None, saves=1)
