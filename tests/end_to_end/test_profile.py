"""`--profile` as a user gives it: what it writes, and that the run is the same."""

import gzip
import json
import subprocess
import sys

from nanovllm_core import LLM, Machine, Recipe, Registry, make_plan
from nanovllm_core.callbacks.progress import Progress
from nanovllm_core.training.profiling import PHASES


def nanovllm(folder, *words):
    command = [sys.executable, "-m", "nanovllm_core.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["loss"], x["gradient_norm"]) for x in lines if "loss" in x]


def check(profile, steps):
    """Both files of so many steps."""
    assert sorted(p.name for p in profile.iterdir()) == ["phases.txt", "trace.json.gz"]
    with gzip.open(profile / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    spans = {phase: [e for e in events if e.get("name") == f"nanovllm: {phase}"] for phase in PHASES}
    assert len(spans["data"]) == len(spans["optimizer"]) == steps
    assert len(spans["forward"]) == len(spans["backward"]) == 2 * steps  # micro-batches
    lines = (profile / "phases.txt").read_text().splitlines()
    told = {
        words[0]: float(words[1]) for line in lines if len(words := line.split()) == 2 and words[0] in (*PHASES, "all")
    }
    for phase in PHASES:
        assert abs(told[phase] - sum(e["dur"] for e in spans[phase]) / 1e3 / steps) < 0.002  # ms, to three digits
    assert abs(told["all"] - sum(told[phase] for phase in PHASES)) < 0.005
    costs = [line.split() for line in lines if "%" in line]
    assert len(costs) == 25
    assert [float(c[0]) for c in costs] == sorted((float(c[0]) for c in costs), reverse=True)
    assert any(c[3] == "aten::mm" for c in costs)
    return lines[0]


def test_a_profiled_run_is_the_same_run(folder, go):
    said = nanovllm(folder, "run", "recipe.yaml", "--profile")
    assert check(folder / "out" / "profile", 3).startswith("steps 4 to 6 on ")
    assert "profiled steps 4 to 6: " in said
    assert "MFU" not in said  # of no CPU is the peak known
    plain, watch = go("output_dir=plain")
    assert trained(folder / "out") == trained(plain) == [(m["loss"], m["gradient_norm"]) for m in watch.steps.values()]
    assert (folder / "out" / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert not (plain / "profile").exists()
    ours, theirs = (json.loads((p / "plan.lock.json").read_text()) for p in (folder / "out", plain))
    assert ours["identity"] == theirs["identity"]
    assert "profile" not in json.dumps(ours["recipe"])
    assert LLM(folder / "out").generate("The river")[0]["text"] is not None
    before = (folder / "out" / "profile" / "phases.txt").read_bytes()
    assert "this run is finished (6 steps)" in nanovllm(folder, "run", "recipe.yaml")  # it is no key of the run
    longer = nanovllm(folder, "run", "recipe.yaml", "--profile", "--set", "train.max_steps=8")
    assert "profiled step 8: " in longer
    assert check(folder / "out" / "profile", 1).startswith("step 8 on ")
    assert (folder / "out" / "profile" / "phases.txt").read_bytes() != before


def test_of_several_ranks_the_first_is_profiled(several):
    assert several.run("callbacks=[metrics]").returncode == 0
    assert several.run("callbacks=[metrics]", "output_dir=profiled", extra=("--profile",)).returncode == 0
    check(several.folder / "profiled" / "profile", 3)
    assert several.losses() == several.losses("profiled")
    assert several.same("out", "profiled")


def test_the_guides_command_line_profiles_too(folder):
    keys = {
        "dataset_path": "docs", "output_dir": "guided", "model_size": "tiny", "num_train_epochs": 1, "max_seq_length": 64,
        "chunk_overlap": 8, "min_chunk_size": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1,
    }  # fmt: skip
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    said = nanovllm(folder, "train", "--train_from_scratch", *flags, "--profile")
    assert "profiled step" in said
    assert (folder / "guided" / "profile" / "phases.txt").exists()


def test_progress_tells_utilisation_where_it_is_known(folder, capsys):
    plan = make_plan(Recipe.load(folder / "recipe.yaml"), Registry.from_environment(), Machine())
    progress = Progress()
    progress.run_started(plan)
    figures = {"loss": 2.5, "learning_rate": 1e-4, "epoch": 0.5, "tokens_per_second": 1234.0, "total_steps": 4}
    progress.step_done(1, {**figures, "mfu": 0.41234})
    progress.step_done(2, figures)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))
    assert "1,234 tokens/s  MFU 41.2 %" in first
    assert "MFU" not in second
