"""One recipe on several ranks: the same losses, the same step, one message."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_layout_has_the_losses_of_one_rank_and_goes_on_from_any_other(tmp_path):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "layouts.py", "--steps", "12", "--pairs", "fsdp2-ddp2,2x2-fsdp4,one-tensor2",
         "--out", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(out.read_text())
    assert len(got["layouts"]) == 6
    assert len(got["pairs"]) == 3
    assert got["deterministic"] == dict.fromkeys(got["deterministic"], True)
    assert len(got["deterministic"]) == 6
    assert not got["wrong"]


def test_an_error_is_told_once_and_not_tried_again(several):
    done = several.run("data.path=nowhere", processes=3, extra=("--max-restarts", "2"))
    assert done.returncode == 2
    assert done.stderr.count("nanovllm: ") == 1, done.stderr
    assert re.match(r"nanovllm: rank \d: ", done.stderr)


def test_a_world_that_is_not_there_is_told(several):
    process = several.start(environment={"WORLD_SIZE": "2"}, processes=0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1, err
    assert "WORLD_SIZE is 2, and the other ranks cannot be reached (ValueError: " in err
    assert "RANK expected, but not set" in err


def test_a_plan_for_several_ranks_can_be_looked_at(several):
    def explained(*more):
        command = [*several.command(processes=0), "--nproc", "4", *more]
        command[command.index("run")] = "explain"
        return subprocess.run(command, cwd=several.folder, capture_output=True, text=True, check=True).stdout

    assert "layout: data 4 x shard 1 x tensor 1" in explained()
    assert "layout: data 1 x shard 2 x tensor 2" in explained("--set", "parallel={use: mesh, shard: 2, tensor: 2}")


@pytest.mark.parametrize(("key", "there", "here"), [("learning_rate", "0.001", "0.002"), ("save_steps", "2", "3")])
def test_a_rank_that_would_run_something_else_is_refused_before_the_first_step(several, port, key, there, here):
    processes = several.plain(port, [[f"train.{key}={value}"] for value in (there, here)])
    told = "".join(p.communicate(timeout=120)[1] for p in processes)
    assert [p.returncode for p in processes] == [2, 2], told
    assert told.count(f"recipe.train.{key}: {there} there, {here} here") == 1, told
    assert "rank 1 would run" in told
    assert not (several.folder / "out" / "metrics.jsonl").exists()


def test_agents_of_two_nodes_find_each_other(several, port):
    agents = several.nodes(port=port)
    said = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert several.run("output_dir=one", processes=0).returncode == 0
    assert several.losses() == pytest.approx(several.losses("one"), rel=1e-6)


def test_the_step_stays_as_it_was_on_another_number_of_ranks(several):
    sets = ("train.global_batch_size=null", "train.gradient_accumulation_steps=2", "train.lr_scheduler_type=constant")
    done = several.run(*sets, "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    done = several.run(*sets, "train.max_steps=8", processes=0)
    assert done.returncode == 0, done.stderr
    assert "4 sequences a step, as before; 2 would follow" in done.stdout
    assert "going on from checkpoint-4" in done.stdout
    done = several.run(*sets, "train.max_steps=8", "train.gradient_accumulation_steps=1", processes=0)
    assert "the old contents of" in done.stdout


def test_what_deterministic_cannot_keep_is_refused_with_its_reason(several):
    done = several.run("train.deterministic=true", "train.global_batch_size=6", processes=0)
    assert done.returncode == 2
    assert (
        "train.deterministic: a step of 6 sequences in micro-batches of 1 on 1 ranks; it needs 1, 2, 4, 8"
        in done.stderr
    )
    done = several.run("train.deterministic=true", "parallel=fsdp")
    assert done.returncode == 2
    assert "train.deterministic is kept by single and ddp alone" in done.stderr
    small = ("train.deterministic=true", "train.global_batch_size=null", "train.gradient_accumulation_steps=1")
    assert several.run(*small, processes=0).returncode == 0
    done = several.run(*small, "train.max_steps=8")  # the step that the folder's run had is too small for two ranks
    assert done.returncode == 2
    assert "a step of 1 sequences in micro-batches of 1 on 2 ranks" in done.stderr


def test_what_is_frozen_thaws_on_every_layout(several):
    rules = (
        "train.freeze=model.layers.0.*", "train.unfreeze=[{at: 3, parameters: ['model.layers.1.*', 'model.norm.*']}]",
        "train.gradient_checkpointing=true", "train.max_steps=8", "train.learning_rate=1e-2",
    )  # fmt: skip
    assert several.run(*rules, "output_dir=one", processes=0).returncode == 0
    one, wanted = load_file(several.folder / "one" / "model.safetensors"), several.losses("one")
    for name in ("ddp", "fsdp", "tensor"):
        done = several.run(*rules, f"output_dir={name}", f"parallel={name}")
        assert done.returncode == 0, done.stderr
        assert "parameters thaw" in done.stdout
        assert several.losses(name) == pytest.approx(wanted, rel=1e-5), name
        held = load_file(several.folder / name / "model.safetensors")
        for key, value in one.items():
            frozen = key.startswith("model.layers.0.")
            assert held[key].equal(value) if frozen else (held[key] - value).abs().mean() < 1e-5, (name, key)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("--max-restarts", "-1"), {}, "argument --max-restarts: got '-1', allowed: a number from 0"),
        (("--max-restarts", "2"), {}, "--max-restarts 2: it needs --nproc"),
        (("--nproc", "²"), {}, "--nproc: got '²', allowed: a number from 1, or gpu"),
        (("--nproc", "2"), {"TORCHELASTIC_RUN_ID": "x"}, "torchrun has started the processes already"),
    ],
)
def test_words_that_start_nothing_are_refused(several, words, environment, said):
    process = several.start(processes=0, extra=words, environment=environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in err


def test_processes_are_started_whatever_the_environment_says(several):
    process = several.start("train.max_steps=100000", environment={"WORLD_SIZE": "1", "NANOVLLM_LAUNCHER": "1"})
    several.under_way(process, 1)
    assert sorted(several.ranks()) == [0, 1]
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + 15
