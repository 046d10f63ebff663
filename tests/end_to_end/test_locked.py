"""`--locked FILE`: a run goes on only where everything that can change its result is as it was."""

import json
import shutil

import pytest
from attrs import fields

from nanovllm_core import Machine, Recipe, Registry, make_plan
from nanovllm_core.cli import main
from nanovllm_core.errors import LockError
from nanovllm_core.lock import COUNTED, IF_SET, TRAIN_KEYS, UNCOUNTED, contents, drift, identity, lock_of, refuse_drift
from nanovllm_core.optimisation import Train


@pytest.fixture
def lock(folder):
    """Writes the lock of the folder's recipe, changed by settings; the lock's path."""

    def lock(*sets, machine=None, **kinds):
        plan = planned(folder, *sets, machine=machine, **kinds)
        fingerprint, named = plan.data.documents.fingerprint(), contents(plan)
        made = lock_of(plan, identity(plan, fingerprint, named), fingerprint, named)
        (folder / "lock.json").write_text(json.dumps(made))
        return folder / "lock.json"

    return lock


def planned(folder, *sets, machine=None, **kinds):
    recipe = Recipe.load(folder / "recipe.yaml", sets=sets)
    return make_plan(recipe, Registry.from_environment().extended(**kinds), machine or Machine())


def drifted(folder, path, *sets, **more):
    with pytest.raises(LockError) as caught:
        refuse_drift(planned(folder, *sets, **more), path)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{path}: what would run here is not what was locked there")
    return [line.strip() for line in lines]


def test_the_same_is_let_through_wherever_it_lies_and_however_it_is_said(folder, lock):
    path = lock()
    refuse_drift(planned(folder), path)
    unchanged = [
        "output_dir=elsewhere", "train.logging_steps=7", "train.save_steps=9", "train.eval_steps=9", "callbacks=[]",
        "generate.prompts=[Other]", "data.readers=[jsonl, auto]", "parallel=single",
        "tokenizer={use: nanovllm/bpe, size: 400}", "train.beta1=0.9",
    ]  # fmt: skip
    refuse_drift(planned(folder, *unchanged, machine=Machine(device_name="another", cores=3)), path)
    (folder / "docs").rename(folder / "moved")
    refuse_drift(planned(folder, "data.path=moved"), path)


@pytest.mark.parametrize(
    ("setting", "lines"),
    [
        ("train.seed=7", ["recipe.train.seed: 42 there, 7 here"]),
        ("train.max_steps=7", ["recipe.train.max_steps: 6 there, 7 here"]),
        ("model.tied=false", ["components.model.options.tied: true there, false here", "parameters: "]),
        ("data.chunk_overlap=9", ["chunk_overlap: 8 there, 9 here"]),
        ("data.eval_fraction=0.3", ["recipe.data.eval_fraction: 0.2 there, 0.3 here"]),
        ("train.mixed_precision=bf16", ["compute_dtype: 'float32' there, 'bfloat16' here"]),
        (
            "data.extractors={use: fields, chat: false}",
            ["components.data.extractors[0].options.chat: true there, false here"],
        ),
        (
            "data.readers={use: txt, encoding: latin-1}",
            ["components.data.readers[0].options", "components.data.readers[0].use"],
        ),
    ],
)
def test_each_thing_that_drifted_is_said(folder, lock, setting, lines):
    found = drifted(folder, lock(), setting)
    for line in lines:
        assert any(text.startswith(line) for text in found), found


def test_a_document_a_device_and_a_version(folder, lock):
    path = lock()
    (folder / "docs" / "one.json").write_text('{"text": "changed"}')
    [line] = drifted(folder, path)
    assert line.startswith("data.sha256: '")
    there = json.loads(lock().read_text())
    there["versions"]["torch"] = "1.0"
    there["components"]["kernels.attention"]["version"] = "0.0.9"
    there["device"]["kind"] = "cuda"
    path.write_text(json.dumps(there))
    found = drifted(folder, path)
    assert [line.partition(" there")[0] for line in found] == [
        "components.kernels.attention.version: '0.0.9'",
        "versions.torch: '1.0'",
        "device.kind: 'cuda'",
    ]


def test_a_named_model_counts_by_its_content_not_by_its_place(go, folder, lock):
    out, _ = go("train.max_steps=1", "generate.prompts=[]")
    shutil.copytree(out, folder / "first")
    shutil.copytree(out, folder / "second")
    tuned = ("tokenizer=auto", "output_dir=tuned")
    path = lock("model={use: pretrained, path: first}", *tuned)
    refuse_drift(planned(folder, "model={use: pretrained, path: second}", *tuned), path)
    weights = bytearray((folder / "second" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "second" / "model.safetensors").write_bytes(weights)
    [line] = drifted(folder, path, "model={use: pretrained, path: second}", *tuned)
    assert line.startswith("contents.model.path: '")


def test_a_reader_that_is_installed_but_reads_nothing_does_not_count(folder, lock):
    from nanovllm_readers.text import Txt

    class Other(Txt):
        """Takes nothing."""

    assert drift(*(json.loads(lock(**kinds).read_text()) for kinds in ({}, {"extractors": {"more": Other}}))) == []


def test_the_command_refuses_before_anything_is_written(folder, capsys):
    recipe, out = str(folder / "recipe.yaml"), folder / "out"
    assert main(["run", recipe, "--set", "callbacks=[]"]) == 0
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    path = str(out / "plan.lock.json")
    for command in ("run", "explain"):
        capsys.readouterr()
        assert main([command, recipe, "--locked", path, "--set", "train.seed=7", "--set", "train.beta1=0.8"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "  recipe.train.beta1: 0.9 there, 0.8 here\n" in told.err
        assert "  recipe.train.seed: 42 there, 7 here\n" in told.err
        assert len(told.err.splitlines()) == 3
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert main(["explain", recipe, "--locked", path]) == 0
    assert main(["run", recipe, "--locked", path, "--set", "callbacks=[]"]) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "lock.jsn: no such file; did you mean 'lock.json'?"),
        (b"", "not a lock that a run wrote (JSONDecodeError"),
        (b"\xff", "not a lock that a run wrote (UnicodeDecodeError"),
        (b"[" * 100_000, "not a lock that a run wrote (RecursionError"),
        (b"[]", "not a lock that a run wrote; give an output folder's plan.lock.json"),
        (b'{"identity": "x"}', "a lock of format null, this nanovllm compares format 1"),
        (b'{"identity": "x", "format": 2}', "a lock of format 2, this nanovllm compares format 1"),
    ],
)
def test_a_lock_that_cannot_be_compared_is_one_clear_error(folder, capsys, text, says):
    (folder / "lock.json").write_bytes(text or b"")
    name = "lock.json" if text is not None else "lock.jsn"
    assert main(["explain", str(folder / "recipe.yaml"), "--locked", str(folder / name)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_every_key_of_the_lock_is_counted_or_left_out_on_purpose(lock):
    there = json.loads(lock().read_text())
    tops = {key.partition(".")[0] for key in COUNTED}
    assert set(there) - tops == {"format", "identity", "recipe_sha256"}
    assert set(there["recipe"]) - {"data", "train"} == {
        "tokenizer", "model", "kernels", "parallel", "generate", "callbacks", "output_dir"
    }  # fmt: skip
    for key in (*COUNTED, *UNCOUNTED):  # none of them is misspelt
        inner = there
        while key:
            part = next(k for k in (key, *(key[:i] for i, c in enumerate(key) if c == ".")) if k in inner)
            inner, key = inner[part], key[len(part) + 1 :]


def test_each_key_of_train_counts_for_a_runs_identity_or_is_left_out_on_purpose():
    out = {
        "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size",  # their product counts
        "num_train_epochs", "max_steps", "gradient_checkpointing", "on_bad_step", "max_bad_steps", "early_stopping_patience",
        "early_stopping_min_delta", "eval_steps", "save_steps", "save_total_limit", "logging_steps", "deterministic",
        "rank_timeout",
    }  # fmt: skip
    assert {a.name for a in fields(Train)} == {*TRAIN_KEYS, *IF_SET} | out
    assert not out & {*TRAIN_KEYS, *IF_SET}
