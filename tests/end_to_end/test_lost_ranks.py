"""Ranks and launchers that die, hang or are told to stop: all end in time, nobody is left, the same command goes on."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

LONG = ("train.max_steps=24", "train.save_steps=6", "train.eval_steps=1000")
ENDLESS = ("train.max_steps=100000", "train.save_steps=100000", "train.eval_steps=100000")
IN_TIME = 35  # seconds: 10 after the timeout and what a slow machine adds; torchrun's own patience would be 300


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others_and_the_run_goes_on(several, how):
    assert several.run(*LONG, "output_dir=whole").returncode == 0
    process = several.start(*LONG)
    several.under_way(process, 8)
    began = time.monotonic()
    os.kill(several.ranks()[1], how)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < IN_TIME
    assert process.returncode == 75, err
    assert re.search(r"rank 1 (is gone|says nothing any more), last: (step|saving|evaluating)", err), err
    assert not several.ranks()
    done = several.run(*LONG)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-" in done.stdout
    assert several.losses() == several.losses("whole")
    assert several.same("out", "whole")


CONNECTING = """\
import os, sys, threading, time

def lost(*args, **options):
    os.kill(os.getpid(), int(os.environ["LOST_HOW"]))

def wait():
    while not hasattr(sys.modules.get("torch.distributed"), "init_process_group"):
        time.sleep(0.01)
    sys.modules["torch.distributed"].init_process_group = lost

if os.environ.get("RANK") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_connecting_is_named(several, how):
    (several.folder / "sitecustomize.py").write_text(CONNECTING)
    lost = {"PYTHONPATH": several.first_on_path, "LOST_HOW": str(int(how))}
    began = time.monotonic()
    process = several.start(environment=lost, processes=3)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < IN_TIME + 15, err
    assert "rank 1 says nothing any more, last: " in err or "rank 1 was ended by SIGKILL" in err, err
    assert "Traceback" not in err
    assert not several.ranks()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_frozen_before_training_ends_the_others(several, rank):
    process = several.start()
    several.begun()
    os.kill(several.ranks()[rank], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < IN_TIME
    assert f"rank {rank} says nothing any more, last: " in err, err
    assert not several.ranks()


def test_a_rank_that_is_stopped_when_the_run_is_over_is_ended(several):
    (several.folder / "sitecustomize.py").write_text(
        "import atexit, os, signal\n"
        "if os.environ.get('RANK') == '0':\n"
        "    atexit.register(os.kill, os.getpid(), signal.SIGSTOP)\n"
    )
    process = several.start(environment={"PYTHONPATH": several.first_on_path})
    _, err = process.communicate(timeout=90)
    assert process.returncode == 75, err
    assert (several.folder / "out" / "model.safetensors").exists()
    assert not several.ranks()


def test_restarts_go_on_by_themselves(several):
    process = several.start(*LONG, extra=("--max-restarts", "1"))
    several.under_way(process, 8)
    os.kill(several.ranks()[random.Random(3).randrange(2)], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "starting the 2 processes again, 1 of 1" in err
    assert sorted(several.losses()) == list(range(1, 25))


def test_nodes_that_count_restarts_differently_go_on_together(several, port):
    c10d = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run", "--max-restarts", "2")
    agents = several.nodes(*LONG, port=port, words=c10d, environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"})
    several.under_way(agents[0], 8)
    there = several.ranks()
    os.kill(there[0], signal.SIGSTOP)  # its node restarts because the other does, which does not count there
    os.kill(there[1], signal.SIGKILL)
    said = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sorted(several.losses()) == list(range(1, 25))


def test_a_launcher_that_is_killed_leaves_no_rank_behind(several):
    process = several.start(*ENDLESS)
    several.under_way(process, 5)
    process.kill()
    _, err = process.communicate(timeout=IN_TIME)  # the ranks hold the pipe too
    assert not several.ranks()
    assert err.count("nanovllm: ") == 1, err
    assert err.count("\n") == 1, err
    assert "the launcher that started the ranks has ended" in err or "the store that the ranks share is gone" in err


def test_a_launcher_that_keeps_no_store_leaves_no_rank_behind(several, port):
    agents = several.nodes(*ENDLESS, port=port)
    several.under_way(agents[0], 5)
    agents[1].kill()
    began = time.monotonic()
    said = [agent.communicate(timeout=60)[1] for agent in agents]
    assert time.monotonic() - began < IN_TIME
    assert not several.ranks()
    assert said[1].count("nanovllm: the launcher that started the ranks has ended") == 1, said
    assert "nanovllm: the launcher that started rank 1 has ended" in said[0], said
    assert "Traceback" not in said[1]


def test_a_launcher_that_is_stopped_ends_ranks_that_need_it(several):
    process = several.start("train.max_steps=100000", "train.save_steps=20", "train.eval_steps=100000")
    several.under_way(process, 5)
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + IN_TIME
    while several.ranks() and time.monotonic() < deadline:
        time.sleep(0.2)
    states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in several.ranks().values()]
    assert set(states) <= {"Z"}  # until their launcher looks
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.count("the store that the ranks share does not answer") == 1, err


def test_ranks_that_were_suspended_together_go_on(several):
    process = several.start(*LONG)
    several.under_way(process, 8)
    them = several.ranks().values()
    for pid in them:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(17)  # longer than train.rank_timeout and what is waited beyond it
    for pid in them:
        os.kill(pid, signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def test_a_signal_to_the_launcher_saves_on_all_ranks(several):
    process = several.start(*ENDLESS)
    several.under_way(process, 5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < IN_TIME
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("the same command goes on from checkpoint-") == 1, err
    assert len(list((several.folder / "out").glob("checkpoint-*"))) == 1
    assert not several.ranks()


def test_a_signal_to_one_rank_stops_all_and_is_no_reason_to_start_again(several):
    process = several.start(*ENDLESS, extra=("--max-restarts", "2"))
    several.under_way(process, 5)
    os.kill(several.ranks()[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), err
    assert err.count("the same command goes on from checkpoint-") == 1, err
    assert "starting the 2 processes again" not in err


SLOW = """\
import os, sys, threading, time

def slow(name, seconds, function, when):
    def held(*args, **options):
        if when():
            time.sleep(seconds)
        return function(*args, **options)
    return held

def wait():
    while not hasattr(sys.modules.get("nanovllm_core.job"), "Job"):
        time.sleep(0.01)
    job = sys.modules["nanovllm_core.job"]
    job.assemble = slow("assemble", 14, job.assemble, lambda: os.environ["RANK"] == "1")
    job.export = slow("export", 12, job.export, lambda: os.environ["RANK"] == "0")

if "RANK" in os.environ:
    threading.Thread(target=wait, daemon=True).start()
"""


def test_a_slow_disk_is_no_hang(several):
    (several.folder / "sitecustomize.py").write_text(SLOW)
    process = several.start("train.rank_timeout=3", environment={"PYTHONPATH": several.first_on_path})
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_a_signal_to_ranks_and_launcher_at_once_saves(several, late):
    process = several.start(*ENDLESS)
    several.under_way(process, 5)
    for pid in several.ranks().values():
        os.kill(pid, signal.SIGTERM)
    time.sleep(late)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err.count("the same command goes on from checkpoint-") == 1, err
    assert len(list((several.folder / "out").glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("later", [0.3, 1.5])
def test_a_launcher_that_is_killed_early_leaves_no_rank_behind(several, processes, later):
    process = several.start(*ENDLESS, processes=processes)
    several.begun(processes)
    time.sleep(later)
    process.kill()
    _, err = process.communicate(timeout=IN_TIME)
    assert not several.ranks()
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_before_training_is_named(several, rank):
    process = several.start()
    several.begun()
    os.kill(several.ranks()[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "interrupted" not in err, err
    assert f"nanovllm: rank {rank} was ended by SIGKILL" in err, err


def test_a_signal_to_a_rank_before_training_is_told(several):
    process = several.start()
    several.begun(path="out/plan.lock.json")  # written once all ranks have made their plans
    os.kill(several.ranks()[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "nanovllm: rank 1 was told to stop" in err, err
    assert process.returncode in (75, 128 + signal.SIGTERM)


FAULT = """\
import ctypes, os, pathlib, threading, time

def raises():
    told = pathlib.Path("out/metrics.jsonl")
    while not told.exists() or told.read_text().count("loss") < 5:
        time.sleep(0.05)
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(RuntimeError))

if os.environ.get("RANK") == "1":
    threading.Thread(target=raises, daemon=True).start()
"""


def test_an_exception_of_a_rank_is_told_by_it_alone(several, port):
    (several.folder / "sitecustomize.py").write_text(FAULT)
    first, second = several.plain(port, [ENDLESS] * 2, PYTHONPATH=several.first_on_path)
    told, fault = (process.communicate(timeout=120)[1] for process in (first, second))
    assert (first.returncode, second.returncode) == (75, 1)
    assert fault.count("Traceback") == 1, fault
    assert "RuntimeError" in fault
    assert not told
