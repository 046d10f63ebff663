"""One recipe on several ranks: real processes with gloo between them, started as a user starts them."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRAIN = ("train.global_batch_size=4", "train.per_device_train_batch_size=1", "train.rank_timeout=10")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux: fork and /proc")


def command(*sets, processes=2, extra=()):
    words = [word for s in (*TRAIN, *sets) for word in ("--set", s)]
    start = ["--nproc", str(processes)] if processes else []
    return [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml", *start, *extra, *words]


def run(folder, *sets, **options):
    done = subprocess.run(
        command(*sets, **options), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def same(a, b):
    held, wanted = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return held.keys() == wanted.keys() and all(held[k].equal(wanted[k]) for k in wanted)


def ranks(folder):
    """Processes of the run in `folder`, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = dict(p.partition("=")[::2] for p in (path / "environ").read_text().split("\0"))
            if (path / "cwd").resolve() == folder.resolve() and "RANK" in told:
                found[int(told["RANK"])] = int(path.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


def under_way(process, out, steps):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def test_every_layout_has_the_losses_of_one_rank_and_goes_on_from_any_other(tmp_path):
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "layouts.py", "--steps", "12", "--pairs", "fsdp2-ddp2,2x2-fsdp4,one-tensor2", "--out", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(out.read_text())
    assert len(got["layouts"]) == 6
    assert len(got["pairs"]) == 3
    assert got["deterministic"] == dict.fromkeys(got["deterministic"], True)
    assert len(got["deterministic"]) == 6
    assert not got["wrong"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others_and_the_run_goes_on(folder, how):
    long = ("train.max_steps=40", "train.save_steps=10", "train.eval_steps=1000")
    assert run(folder, *long, "output_dir=whole").returncode == 0
    process = subprocess.Popen(command(*long), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    under_way(process, folder / "out", 12)
    began = time.monotonic()
    os.kill(ranks(folder)[1], how)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 35  # 10 and what a slow machine adds; torchrun's own patience would be 40
    assert process.returncode not in (0, 1), err
    assert re.search(r"rank 1 (is gone|says nothing any more), last: (step|saving)", err), err
    assert not ranks(folder)
    done = run(folder, *long)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-" in done.stdout
    assert losses(folder / "out") == losses(folder / "whole")
    assert same(folder / "out", folder / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_frozen_before_training_ends_the_others(folder, rank):
    process = subprocess.Popen(command(), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(ranks(folder)[rank], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 35  # 10 and what a slow machine adds; torchrun's own patience would be 40
    assert f"rank {rank} says nothing any more, last: " in err, err
    assert not ranks(folder)


def test_restarts_go_on_by_themselves(folder):
    long = ("train.max_steps=30", "train.save_steps=10")
    process = subprocess.Popen(
        command(*long, extra=("--max-restarts", "1")), cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    under_way(process, folder / "out", 12)
    os.kill(ranks(folder)[random.Random(3).randrange(2)], signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "going on from checkpoint-10" in out
    assert max(losses(folder / "out")) == 30


def test_a_signal_to_the_launcher_saves_on_all_ranks(folder):
    long = ("train.max_steps=100000", "train.save_steps=100000", "train.eval_steps=100000")
    process = subprocess.Popen(
        command(*long), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    under_way(process, folder / "out", 5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 25  # torchrun's own patience is 30
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("the same command goes on from checkpoint-") == 1, err
    assert len(list((folder / "out").glob("checkpoint-*"))) == 1
    assert not ranks(folder)


def test_an_error_is_told_once(folder):
    done = run(folder, "data.path=nowhere", processes=3)
    assert done.returncode == 2
    assert done.stderr.count("nanovllm: ") == 1, done.stderr
    assert re.match(r"nanovllm: rank \d: ", done.stderr)


def test_a_rank_that_would_run_something_else_is_refused_before_the_first_step(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            command(f"train.learning_rate={rate}", processes=0),
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank, rate in enumerate(("1e-3", "2e-3"))
    ]  # fmt: skip
    told = "".join(p.communicate(timeout=120)[1] for p in processes)
    assert [p.returncode for p in processes] == [2, 2], told
    assert told.count("recipe.train.learning_rate: 0.001 there, 0.002 here") == 1, told
    assert "rank 1 would run" in told
    assert not (folder / "out" / "metrics.jsonl").exists()


def test_agents_of_two_nodes_find_each_other(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
             "--master-addr", "127.0.0.1", "--master-port", str(port), *command(processes=0)[1:]],
            cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert run(folder, "output_dir=one", processes=0).returncode == 0
    found, wanted = losses(folder / "out"), losses(folder / "one")
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_step_stays_as_it_was_on_another_number_of_ranks(folder):
    sets = ("train.global_batch_size=null", "train.gradient_accumulation_steps=2", "train.lr_scheduler_type=constant")
    done = run(folder, *sets, "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    done = run(folder, *sets, "train.max_steps=8", processes=0)
    assert done.returncode == 0, done.stderr
    assert "4 sequences a step, as before; 2 would follow" in done.stdout
    assert "going on from checkpoint-4" in done.stdout
    done = run(folder, *sets, "train.max_steps=8", "train.gradient_accumulation_steps=1", processes=0)
    assert "the old contents of" in done.stdout


def test_what_deterministic_cannot_keep_is_refused_with_its_reason(folder):
    done = run(folder, "train.deterministic=true", "train.global_batch_size=6", processes=0)
    assert done.returncode == 2
    assert (
        "train.deterministic: a step of 6 sequences in micro-batches of 1 on 1 ranks; it needs 1, 2, 4, 8"
        in done.stderr
    )
    done = run(folder, "train.deterministic=true", "parallel=fsdp")
    assert done.returncode == 2
    assert "train.deterministic is kept by single and ddp alone" in done.stderr


def test_what_is_frozen_thaws_on_every_layout(folder):
    rules = (
        "train.freeze=model.layers.0.*", "train.unfreeze=[{at: 3, parameters: ['model.layers.1.*', 'model.norm.*']}]",
        "train.gradient_checkpointing=true", "train.max_steps=8", "train.learning_rate=1e-2",
    )  # fmt: skip
    assert run(folder, *rules, "output_dir=one", processes=0).returncode == 0
    one, wanted = load_file(folder / "one" / "model.safetensors"), losses(folder / "one")
    for name in ("ddp", "fsdp", "tensor"):
        done = run(folder, *rules, f"output_dir={name}", f"parallel={name}")
        assert done.returncode == 0, done.stderr
        assert "parameters thaw" in done.stdout
        assert losses(folder / name) == pytest.approx(wanted, rel=1e-5), name
        held = load_file(folder / name / "model.safetensors")
        for key, value in one.items():
            frozen = key.startswith("model.layers.0.")
            assert held[key].equal(value) if frozen else (held[key] - value).abs().mean() < 1e-5, (name, key)
