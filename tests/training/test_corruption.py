"""Every way in which a file of a checkpoint can be damaged is seen, named, and the sound one before it is used."""

import json
import random
import shutil

import pytest
import torch
from torch import nn

from nanovllm_core.files import MANIFEST, digest
from nanovllm_core.training import checkpoint, parts
from nanovllm_core.training.optimizer import adamw
from nanovllm_core.training.saver import POINTERS, Saver

PAGE = 4096
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", MANIFEST)


def rest(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "note": "n" * 5000}))
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {str(i): i for i in range(2000)}}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints 1 and 2 of a model of 25,000 parameters."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(50, 250), nn.Linear(250, 50))
    optimizer = adamw(model.named_parameters(), learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    named = list(model.named_parameters())
    for step in (1, 2):
        model(torch.randn(4, 50)).square().sum().backward()
        optimizer.update()
        state = checkpoint.State(
            step=step, position=step, total_steps=9, identity="a", tokenizer="b", metrics={"eval_loss": 2.0}, before={},
            random=[checkpoint.random_state()],
        )  # fmt: skip
        checkpoint.save(root, state, parts.snapshot(named, optimizer), rest)
    return root


def found(root):
    told = []
    newest = checkpoint.newest(root, told.append)
    return newest[1].step if newest else None, told


def damaged(root, name, content):
    """What is found while a file of checkpoint-2 holds `content`."""
    path = root / "checkpoint-2" / name
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        return found(root)
    finally:
        path.write_bytes(whole)


def seen(result, name):
    """The older one is used and the message names the damaged file."""
    step, told = result
    return step == 1 and len(told) == 1 and "checkpoint-2 is damaged" in told[0] and name in told[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere(root, name):
    whole = (root / "checkpoint-2" / name).read_bytes()
    cuts = {*range(0, len(whole), PAGE), 1, len(whole) - 1}
    assert [cut for cut in sorted(cuts) if not seen(damaged(root, name, whole[:cut]), name)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_zeros_or_more_at_its_end(root, name):
    whole = (root / "checkpoint-2" / name).read_bytes()
    for content in (whole[:-1000] + bytes(min(len(whole), 1000)), bytes(len(whole)), whole + b"x"):
        assert seen(damaged(root, name, content), name)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_a_flipped_bit_anywhere(root, name):
    whole, draw = bytearray((root / "checkpoint-2" / name).read_bytes()), random.Random(name)
    places = {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(30))}
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        assert seen(damaged(root, name, content), name), place


def test_a_flipped_bit_of_the_manifest(root):
    """Whatever it makes of it: a name, a size, a digest that is not, or no JSON. White space alone may change."""
    path = root / "checkpoint-2" / MANIFEST
    whole, draw = path.read_bytes(), random.Random(6)
    told = json.loads(whole)
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        step, said = damaged(root, MANIFEST, bytes(content))
        if step != 1:
            assert json.loads(content) == told
        else:
            assert "checkpoint-2 is damaged" in said[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "a folder"])
def test_a_file_that_is_none(root, tmp_path, name, how):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "checkpoint-2" / name).unlink()
    if how == "a folder":
        (copy / "checkpoint-2" / name).mkdir()
    assert seen(found(copy), name)


WRONG = [None, 3, -1, 2.5, True, "text", [], [1], {}, {"a": 1}, [{"size": 1}], float("nan"), 10**30]


@pytest.mark.parametrize("name", ["state.json", MANIFEST])
def test_another_type_where_one_is_expected(root, tmp_path, name):
    """Every value of the file, and the file itself, one at a time; the manifest knows of what stands in state.json."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    folder = copy / "checkpoint-2"
    told, manifest = json.loads((folder / name).read_text()), json.loads((folder / MANIFEST).read_text())
    tried = passed = 0
    for key in [None, *told]:
        for value in WRONG:
            changed = value if key is None else {**told, key: value}
            (folder / name).write_text(json.dumps(changed))
            if name != MANIFEST:
                content = (folder / name).read_bytes()
                told_now = {"size": len(content), "sha256": digest(folder / name)}
                (folder / MANIFEST).write_text(json.dumps(manifest | {name: told_now}))
            step, said = found(copy)
            tried += 1
            if step == 1:
                assert "checkpoint-2" in said[0]
            else:  # a value that a run could have written
                passed += 1
                assert key in (
                    "position",
                    "total_steps",
                    "identity",
                    "tokenizer",
                    "metrics",
                    "before",
                    "evaluated",
                    "progress",
                ), key
                assert type(value) is type(told[key])
    assert tried == len(WRONG) * (1 + len(told))
    assert passed <= (14 if name == "state.json" else 0)


def test_pointers_are_not_believed(root, tmp_path):
    """Whatever checkpoints.json holds, the best is what the checkpoints themselves say, and it is written anew."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    right = {"latest": "checkpoint-2", "best": "checkpoint-1", "best_eval_loss": 2.0}
    for value in [
        *WRONG,
        right,
        {**right, "best": "../.."},
        {**right, "best": "checkpoint-9"},
        {**right, "best_eval_loss": "x"},
    ]:
        (copy / POINTERS).write_text(json.dumps(value))
        saver = Saver(
            root=copy,
            limit=2,
            write_rest=rest,
            saved=lambda step, path: None,
            free=lambda: 0,
            resumed=copy / "checkpoint-2",
        )
        assert (saver.best, saver.best_loss) == ("checkpoint-1", 2.0)
        assert json.loads((copy / POINTERS).read_text()) == right


def test_a_damaged_best_gives_way_to_the_next(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert checkpoint.best(copy, 2) == (copy / "checkpoint-1", 2.0)
    assert checkpoint.best(copy, 0) is None
    (copy / "checkpoint-1" / "config.json").unlink()
    assert checkpoint.best(copy, 2) == (copy / "checkpoint-2", 2.0)
