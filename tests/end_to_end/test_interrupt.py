"""SIGINT and SIGTERM to real processes, at every stage; and the same command afterwards gives the unbroken run."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nanovllm_core import hookimpl
from nanovllm_core.errors import Interrupted
from nanovllm_core.training.stop import StopRequest

AT = """\
import os, sys, time
from pathlib import Path
from nanovllm_core import hookimpl
from nanovllm_core.cli import main
from nanovllm_core.hooks import bind
from nanovllm_core import plan as planning
from nanovllm_core.training import saver

event, number, slow = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "slow"

class At:
    '''Sends this process a signal at an event.'''
    seen = 0
    def here(self, name):
        if name == event:
            At.seen += 1
            if At.seen == 1:
                os.kill(os.getpid(), number)
                if slow:
                    os.kill(os.getpid(), number)
    @hookimpl
    def phase_progress(self, phase, done):
        self.here(phase)
    @hookimpl
    def step_done(self, step, metrics):
        self.here(f"step {step}")
    @hookimpl
    def evaluated(self, step):
        self.here(f"evaluated {step}")

real = planning.Plan.events
planning.Plan.events = lambda self, more=(): real(self, (*more, At()))
if event == "saving":
    write = saver.save
    def slowly(*told):
        os.kill(os.getpid(), number)
        time.sleep(1)
        return write(*told)
    saver.save = slowly
sys.exit(main(["run", "recipe.yaml"]))
"""


def at(folder, event, number=signal.SIGINT, how="once"):
    return subprocess.run(
        [sys.executable, "-c", AT, event, str(int(number)), how], cwd=folder, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def finished(folder):
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml"], cwd=folder, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out" / "model.safetensors"), done.stdout


@pytest.mark.parametrize(
    ("event", "goes_on"),
    [
        ("reading", "begins anew"),
        ("building the vocabulary", "begins anew"),
        ("tokenising", "begins anew"),
        ("evaluated 0", "begins anew"),
        ("step 3", "goes on from checkpoint-3"),
        ("saving", "goes on from checkpoint-"),
    ],
)
def test_the_first_signal_saves_and_ends_and_nothing_is_lost(go, folder, event, goes_on):
    unbroken, watch = go("output_dir=unbroken")
    number = signal.SIGTERM if event in ("reading", "step 3", "saving") else signal.SIGINT
    done = at(folder, event, number)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert f"the same command {goes_on}" in done.stderr
    got, said = finished(folder)
    want = load_file(unbroken / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"]: x["loss"] for x in lines if "loss" in x} == {k: v["loss"] for k, v in watch.steps.items()}
    assert {x["step"] for x in lines if "eval_loss" in x} == set(watch.evaluations)
    if goes_on.endswith(("3", "5")):
        assert goes_on.removeprefix("goes on ") in said


def test_a_second_signal_stops_at_once(folder):
    done = at(folder, "step 3", how="slow")
    assert done.returncode == 130
    assert "stopped at once; the same command goes on from the newest checkpoint" in done.stderr


@pytest.mark.parametrize("at", [3, 4])
def test_a_damaged_checkpoint_is_neither_named_nor_taken_for_saved(go, at):
    out, _ = go("train.save_total_limit=9")
    (out / "finished.json").unlink()
    for step in (4, 6):
        (out / f"checkpoint-{step}" / "state.json").unlink()
    if (out / "checkpoint-3").exists():
        shutil.rmtree(out / "checkpoint-3")
    stop = StopRequest()

    class Asks:
        @hookimpl
        def step_done(self, step):
            if step == at:
                stop.ask()

    with pytest.raises(Interrupted, match=f"goes on from checkpoint-{at}"):
        go("train.save_total_limit=9", "train.save_steps=100", "train.eval_steps=100", callbacks=[Asks()], stop=stop)
    _, watch = go("train.save_total_limit=9")
    assert watch.said(f"going on from checkpoint-{at}")


def test_a_signal_before_the_run_has_begun_ends_it_with_a_word(folder):
    for wait in (0.3, 0.6):
        process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml"], cwd=folder, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(wait)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # below 0: it had not begun to listen
        assert (process.returncode < 0) == (err == "")


def test_one_who_embeds_asks_and_gets_an_exception(go):
    stop = StopRequest()

    class Asks:
        @hookimpl
        def step_done(self, step):
            if step == 3:
                stop.ask()

    with pytest.raises(Interrupted, match="goes on from checkpoint-3"):
        go(callbacks=[Asks()], stop=stop)
    _, watch = go()
    assert watch.said("going on from checkpoint-3")
    asked = StopRequest()
    asked.ask()
    with pytest.raises(Interrupted):
        go("output_dir=other", stop=asked)


def test_the_best_model_is_exported_beside_the_last(go, folder):
    """A learning rate that ruins what was learned: the best checkpoint is an early one."""
    out, watch = go("train.max_steps=8", "train.learning_rate=0.3", "train.lr_scheduler_type=constant", "train.warmup_steps=0",
                    "train.save_total_limit=1", "train.gradient_clipping=0")  # fmt: skip
    losses = {k: v["eval_loss"] for k, v in watch.evaluations.items() if k in (2, 4, 6, 8)}
    best = min(losses, key=losses.get)
    assert best != 8, losses
    assert watch.said(f"the held-out loss was lowest at step {best}")
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-8"}
    held, exported = (load_file(p / "model.safetensors") for p in (out / f"checkpoint-{best}", out / "best"))
    assert all(torch.equal(held[name].to(exported[name].dtype), exported[name]) for name in exported)
    from nanovllm_core import LLM, Machine

    assert LLM(out / "best", machine=Machine()).generate("The river")[0]["token_ids"]


def test_an_interruption_within_an_exec_does_not_change_the_exit_code(tmp_path):
    (tmp_path / "late.py").write_text(
        "import sys\n"
        "from nanovllm_core import cli, commands\n"
        "def init(args): exec('raise KeyboardInterrupt')\n"
        "commands.init = init\n"
        "sys.argv[1:] = ['init', 'demo']\n"
        "cli.entry()\n"
    )
    done = subprocess.run([sys.executable, "-m", "late"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "nanovllm: interrupted\n")
