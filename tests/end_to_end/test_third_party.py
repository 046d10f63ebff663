"""Strangers' distributions: the wheels of examples/ beside ours in a new environment, used by name in one recipe.

Nothing is downloaded: the new environment finds what is heavy (torch, pytest, ...) in the running one, by a path file,
which is not followed further; so our own packages and the examples come from the wheels alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(p.parent for p in ROOT.glob("examples/*/pyproject.toml"))
PACKAGES = ("nanovllm_core", "nanovllm_readers", *(p.name.replace("-", "_") for p in EXAMPLES))
RECIPE = """\
data:
  path: docs
  readers: [markdown, csv]
  extractors: [markdown, fields]
  max_seq_length: 96
  chunk_overlap: 8
  min_chunk_size: 8
  eval_fraction: 0.2
tokenizer: bytes
model: {use: conv, hidden: 48, dilations: [1, 4, 16]}
kernels: {swiglu: lean}
parallel: flat
train: {max_steps: 60, learning_rate: 3e-3, warmup_steps: 2, per_device_train_batch_size: 2, save_steps: 10, eval_steps: 30}
generate: {prompts: ["The river"], max_tokens: 16, temperature: 0}
callbacks: [progress, metrics, tensorboard]
output_dir: out
"""
WORDS = "the river runs past old mills and under a stone bridge where children fish for trout".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the new environment in `venv`, documents in `docs`, `recipe.yaml`, and the finished run in `out`."""
    folder = tmp_path_factory.mktemp("stranger")
    pip = [sys.executable, "-m", "pip"]
    offline = ["-q", "--no-deps", "--no-index"]
    checked([*pip, "wheel", *offline, "--no-build-isolation", "-w", "wheels", ROOT, *EXAMPLES], folder)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "heavy.pth").write_text(sysconfig.get_path("purelib"))
    checked([*pip, "--python", python, "install", *offline, *(folder / "wheels").glob("*.whl")], folder)

    draw = random.Random(3)
    text = lambda n: " ".join(draw.choice(WORDS) for _ in range(n))  # noqa: E731
    (folder / "docs" / "deep").mkdir(parents=True)
    for i in range(6):
        (folder / "docs" / "deep" / f"{i}.md").write_text(f"# {text(3)}\n\n{text(60)} **{text(2)}**.\n")
        rows = "".join(f'{i},"{text(30)}, {text(2)}"\n' for _ in range(4))
        (folder / "docs" / f"{i}.csv").write_text(f"id,text\n{rows}")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def environment():
    keep = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**keep, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


def checked(command, folder):
    """Standard output and standard error of a command that succeeds."""
    done = subprocess.run([str(c) for c in command], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    return done.stdout, done.stderr


def nanovllm(place, *arguments):
    return checked([place / "venv" / "bin" / "nanovllm", *arguments], place)


@pytest.fixture(scope="module")
def said(place):
    """What the whole run says."""
    return nanovllm(place, "run", "recipe.yaml")[0]


def test_packages_come_from_the_wheels_alone(place):
    code = "import importlib, sys; print(*(importlib.import_module(n).__file__ for n in sys.argv[1:]), sep='\\n')"
    found = checked([place / "venv" / "bin" / "python", "-c", code, *PACKAGES], place)[0].splitlines()
    assert len(found) == len(PACKAGES) == 8
    assert all(Path(path).is_relative_to(place / "venv") for path in found), found


def test_plugins_lists_them_with_their_distributions(place):
    rows = json.loads(nanovllm(place, "plugins", "--json")[0])
    assert {row["state"] for row in rows} == {"ok"}
    theirs = {(r["kind"], r["name"], r["distribution"]) for r in rows if r["distribution"] != "nanovllm"}
    assert theirs == {
        ("readers", "markdown", "nanovllm-markdown"),
        ("readers", "csv", "nanovllm-markdown"),
        ("extractors", "markdown", "nanovllm-markdown"),
        ("tokenizers", "bytes", "nanovllm-bytes"),
        ("models", "conv", "nanovllm-conv"),
        ("kernels", "lean", "nanovllm-swiglu"),
        ("parallel", "flat", "nanovllm-flat"),
        ("callbacks", "tensorboard", "nanovllm-tensorboard"),
    }


def test_explain_says_who_does_what(place):
    told = nanovllm(place, "explain", "recipe.yaml")[0]
    for text in (
        "markdown from nanovllm-markdown 0.1.0: 6 files",
        "csv from nanovllm-markdown 0.1.0: 6 files",
        "bytes from nanovllm-bytes 0.1.0, by recipe",
        "conv from nanovllm-conv 0.1.0, by recipe: random weights",
        "hidden: 48 (recipe.yaml:10:28",
        "lean from nanovllm-swiglu 0.1.0, by recipe: keeps one activation instead of two",
        "flat from nanovllm-flat 0.1.0, by recipe: when it is named",
        "tensorboard from nanovllm-tensorboard 0.1.0",
    ):
        assert text in told, told


def test_the_recipe_learns(place, said):
    assert "30 documents in 12 files" in said
    assert "conv model: nanovllm_conv" in said
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line]
    assert held_out[0] > 7.5
    assert held_out[-1] < 0.6 * held_out[0]
    locked = json.loads((place / "out" / "plan.lock.json").read_text())["components"]
    assert locked["model"]["use"] == "nanovllm-conv/conv"
    assert locked["kernels.swiglu"]["use"] == "nanovllm-swiglu/lean"


def test_tensorboard_shows_the_run(place, said):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "out" / "tensorboard"))
    events.Reload()
    losses = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    wanted = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in losses if "loss" in line]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == wanted


def test_the_result_opens_without_being_told_how(place, said):
    answer, complaint = nanovllm(
        place, "generate", "out", "--prompt", "The river", "--temperature", "0", "--max-tokens", "16", "--json"
    )
    assert complaint == ""
    text = json.loads(answer)["text"]
    assert f"--- 'The river' continues:\n{text}\n---" in said


def test_a_killed_run_goes_on_to_the_same_weights(place, said):
    command = [place / "venv" / "bin" / "nanovllm", "run", "recipe.yaml", "--set", "output_dir=killed"]
    running = subprocess.Popen(
        [str(c) for c in command], cwd=place, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not (place / "killed" / "checkpoint-20").exists():
        assert running.poll() is None
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (place / "killed" / "finished.json").exists()
    assert "going on from checkpoint-" in checked(command, place)[0]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (place / "killed" / name).read_bytes() == (place / "out" / name).read_bytes()


def test_their_own_tests_pass_there(place):
    tests = [example / "tests" for example in EXAMPLES]
    command = [place / "venv" / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    assert " passed" in checked(command, place)[0]
