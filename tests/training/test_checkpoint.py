"""Checkpoints come back bit for bit; damaged ones are passed over with the reason; half-written ones never show."""

import json
import pickletools
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanovllm_core.errors import CheckpointError
from nanovllm_core.files import MANIFEST, damage, written_whole
from nanovllm_core.training import checkpoint, parts
from nanovllm_core.training.optimizer import adamw


def small_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def trained(seed, steps=3):
    model = small_model(seed)
    optimizer = adamw(model.named_parameters(), learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(steps):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.update()
        optimizer.zero_grad()
    return model, optimizer


def state(step, **changes):
    values = {"position": step * 8, "total_steps": 100, "identity": "abc", "tokenizer": "def"}
    values |= {"metrics": {"eval_loss": 1.5}, "before": {"eval_loss": 2.5}}
    return checkpoint.State(step=step, random=[checkpoint.random_state()], **{**values, **changes})


def save(root, step, model, optimizer, rest=lambda folder: None):
    named = list(model.named_parameters())
    return checkpoint.save(root, state(step), parts.snapshot(named, optimizer), rest)


def test_weights_optimizer_and_state_come_back(tmp_path):
    model, optimizer = trained(seed=1)
    folder = save(tmp_path, 7, model, optimizer, lambda f: (f / "config.json").write_text("{}"))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    found, back = checkpoint.newest(tmp_path, pytest.fail)
    assert (found, back.step, back.position, back.identity, back.metrics) == (folder, 7, 56, "abc", {"eval_loss": 1.5})

    other, fresh = trained(seed=2, steps=0)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(folder / "model.safetensors"))
    parts.load_optimizer(folder, fresh, other.named_parameters())
    for m, o in ((model, optimizer), (other, fresh)):
        torch.manual_seed(9)
        m(torch.randn(4, 5)).square().sum().backward()
        o.update()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_random_state_comes_back():
    torch.manual_seed(3)
    saved = checkpoint.random_state()
    first = torch.rand(5)
    checkpoint.set_random_state(saved)
    assert torch.equal(first, torch.rand(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_random_state_of_a_gpu_comes_back():
    torch.cuda.manual_seed(3)
    torch.rand(7, device="cuda")
    saved = checkpoint.random_state()
    first = torch.rand(5, device="cuda")
    checkpoint.set_random_state(saved)
    assert torch.equal(first, torch.rand(5, device="cuda"))


def test_the_state_of_a_gpu_is_passed_over_where_there_is_none():
    saved = checkpoint.random_state().split()[0]
    first = torch.rand(5)
    checkpoint.set_random_state(f"{saved} {saved}" if not torch.cuda.is_initialized() else saved)
    assert torch.equal(first, torch.rand(5))


def test_the_newest_by_number_not_by_name(tmp_path):
    model, optimizer = trained(seed=1)
    for step in (9, 10, 100):
        save(tmp_path, step, model, optimizer)
    assert checkpoint.newest(tmp_path, pytest.fail)[1].step == 100


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, name, how):
    model, optimizer = trained(seed=1)
    save(tmp_path, 1, model, optimizer)
    path = save(tmp_path, 2, model, optimizer) / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = random.Random(4).randrange(len(content))
        content[at] ^= 0x10
        path.write_bytes(content)
    told = []
    assert checkpoint.newest(tmp_path, told.append)[1].step == 1
    assert len(told) == 1
    assert "checkpoint-2 is damaged" in told[0]


def test_no_sound_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    assert checkpoint.newest(tmp_path / "absent", pytest.fail) is None


def test_an_exception_while_writing_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "checkpoint-1"
    with written_whole(folder) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError), written_whole(folder) as partial:  # noqa: PT012
        (partial / "a").write_text("new")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    with written_whole(folder) as partial:
        (partial / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert damage(folder) is None


KILLED = """\
import json, os, shutil, sys
from pathlib import Path
from nanovllm_core.files import written_whole

folder, calls = Path(sys.argv[1]), []

def counted(act):
    def call(*arguments, **options):
        calls.append(act)
        if len(calls) == int(sys.argv[2]):
            os._exit(9)
        return act(*arguments, **options)
    return call

with written_whole(folder) as partial:
    shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    state = json.loads((folder / "state.json").read_text())
    (partial / "state.json").write_text(json.dumps(state | {"position": 99}))
    os.replace, shutil.rmtree = counted(os.replace), counted(shutil.rmtree)
"""


@pytest.mark.parametrize(("call", "position"), [(1, 8), (2, 8), (3, 99)])
def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, call, position):
    folder = save(tmp_path, 1, *trained(seed=1))
    (tmp_path / ".checkpoint-notes.old").mkdir()  # a stranger's
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(call)])
    assert killed.returncode == 9
    assert folder.exists() == (call != 2)  # the second call would put the new folder where the old one was
    found, back = checkpoint.newest(tmp_path, pytest.fail)
    assert (found, back.position) == (folder, position)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".checkpoint-notes.old", "checkpoint-1"]


def test_the_next_write_brings_back_what_a_kill_left_aside(tmp_path):
    folder = save(tmp_path, 1, *trained(seed=1))
    subprocess.run([sys.executable, "-c", KILLED, str(folder), "2"])
    with pytest.raises(RuntimeError), written_whole(folder):
        raise RuntimeError
    assert damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(seed=1)
    folder = save(tmp_path, 1, model, optimizer)
    other = nn.Linear(5, 5)
    fresh = adamw(other.named_parameters(), learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    with pytest.raises(CheckpointError, match="another model"):
        parts.load_optimizer(folder, fresh, other.named_parameters())


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    model, optimizer = trained(seed=1)
    for path in save(tmp_path, 1, model, optimizer).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with pytest.raises((ValueError, IndexError)):
                list(pickletools.genops(path.read_bytes()))
