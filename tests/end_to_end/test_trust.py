"""What a run says and keeps when something goes against it: lost checkpoints, full disks, interruptions, odd terminals."""

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

from nanovllm_core.errors import NanoError, OptionError, RecipeError


def start(*arguments, cwd, **environment):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nanovllm_core.cli", *arguments], cwd=cwd, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def result(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_a_finished_model_whose_checkpoints_are_lost_is_never_overwritten(go, loss):
    out, _ = go()
    model = (out / "model.safetensors").read_bytes()
    for path in out.glob("checkpoint-*"):
        if loss == "deleted":
            shutil.rmtree(path)
        else:
            with (path / "model.safetensors").open("ab") as file:
                file.write(b"x")
    _, watch = go("train.max_steps=7")
    assert watch.said("no sound checkpoint to go on from, so the run begins anew")
    assert (out / "previous" / "1" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("name", ["../recipe.yaml", "plan.lock.json", "", "sub/x.jsonl", "x.txt", ".jsonl"])
def test_metrics_go_to_a_plain_name_of_their_own(go, folder, name):
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(
        OptionError, match=r"callbacks\[0\]\.file: got '.*', allowed: a plain file name that ends in \.json"
    ):
        go(f"callbacks=[{{use: metrics, file: '{name}'}}]")
    assert (folder / "recipe.yaml").read_bytes() == before


def test_exported_files_may_be_read_by_whoever_may_read_new_files(go):
    out, _ = go()
    for path in (out / "model.safetensors", *out.glob("checkpoint-2/*")):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((out / "config.json").stat().st_mode), path.name


def test_a_full_disk_is_one_message_and_leaves_the_last_checkpoint(folder):
    limit = 20_000_000  # bytes of a file: less than a checkpoint's moments

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing on then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml"], cwd=folder, capture_output=True, text=True,
        preexec_fn=small_files, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint-2: cannot be written" in done.stderr
    assert not list((folder / "out").glob("checkpoint-*"))


def test_an_interruption_says_where_the_same_command_goes_on(folder):
    def interrupted(wait_for, *sets):
        process = start("run", "recipe.yaml", *(part for s in sets for part in ("--set", s)), cwd=folder)
        deadline = time.monotonic() + 60
        while not wait_for() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        return result(process)

    out = folder / "out"
    code, _, err = interrupted((out / "plan.lock.json").exists)
    assert (code, err.count("\n")) == (130, 2), err
    assert "the same command begins anew: no " in err
    code, _, err = interrupted(
        lambda: lines(out / "metrics.jsonl") > 3, "train.max_steps=100000", "train.save_steps=100000"
    )
    assert (code, err.count("\n")) == (130, 2), err
    assert "stopped; the same command goes on from checkpoint-" in err
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_a_terminal_that_cannot_show_a_character_does_not_stop_a_run(folder):
    code, out, err = result(
        start("run", "recipe.yaml", "--set", "generate.prompts=[é]", cwd=folder, PYTHONIOENCODING="ascii")
    )
    assert (code, err) == (0, "")
    assert "--- '?' continues:" in out
    assert (folder / "out" / "finished.json").exists()


def test_other_runs_folders_among_the_documents_are_left_out(go, folder):
    shutil.copytree(folder / "docs", folder / "project")
    go("data.path=project", "output_dir=project/first")
    _, watch = go("data.path=project", "output_dir=project/second", "train.seed=2")
    assert watch.said("1 output folders of other runs are left out: first")
    assert watch.said("11 documents in 7 files")


def test_a_setting_never_drops_another_without_a_word(go):
    with pytest.raises(RecipeError, match=r"--set tokenizer\.use=bpe: would drop what --set tokenizer\.size=300 set"):
        go("tokenizer.size=300", "tokenizer.use=bpe")


def test_a_loss_that_is_not_finite_says_what_the_next_run_will_do(go):
    with pytest.raises(NanoError, match="which is another run, begins anew and moves"):
        go("train.learning_rate=1e30", "train.max_steps=30", "train.gradient_clipping=0")


def test_explain_says_when_memory_will_not_do_and_shows_every_section(folder):
    from nanovllm_core import Machine, Recipe, Registry, make_plan
    from nanovllm_core.explain import explain

    def told(memory):
        recipe = Recipe.load(folder / "recipe.yaml", sets=["model.size=large"])
        return explain(make_plan(recipe, Registry.from_environment(), Machine(memory=memory)))

    assert "GB and 1.0 GB are free: lower train.per_device_train_batch_size" in told(10**9)
    assert "are free: lower" not in told(10**12)
    assert 'prompts: ["The river"] (' in told(0)
    assert "(recipe.yaml:14:13)" in told(0).replace(str(folder) + "/", "")
