"""`nanovllm estimate`: for a person and for tools."""

import json
import os
import subprocess
import sys

import pytest

from nanovllm_core.cli import main


def test_the_estimate_of_a_recipe(folder, capsys):
    arguments = ["estimate", str(folder / "recipe.yaml"), "--set", "train.freeze=model.layers.*"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "total" in told
    assert "with train.gradient_checkpointing: true the total is" in told
    assert "with train.gradient_checkpointing: selective the total is" in told
    assert main([*arguments, "--json"]) == 0
    frozen = json.loads(capsys.readouterr().out)
    assert main([*arguments[:2], "--json"]) == 0
    all_trained = json.loads(capsys.readouterr().out)
    assert frozen["weights"] == all_trained["weights"]
    layers = all_trained["gradients"] - frozen["gradients"]
    assert 0 < layers < all_trained["gradients"]
    assert all_trained["optimizer"] - frozen["optimizer"] == 2 * layers
    assert frozen["total"] == max(frozen["moments"].values()) < all_trained["total"]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep RLIMIT_AS")
def test_memory_that_runs_out_is_told_with_what_needs_less(folder):
    import resource

    sets = (
        "data.max_seq_length=512", "data.eval_fraction=0", "train.per_device_train_batch_size=256",
        "train.gradient_accumulation_steps=2",
    )  # fmt: skip
    words = [w for s in sets for w in ("--set", s)]
    for i in range(8):
        (folder / "docs" / f"{i}.txt").write_text(f"{i} " + "the river runs by the old stone mill. " * 1500)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml", *words], cwd=folder, capture_output=True, text=True,
        preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "2"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out of memory on cpu: the estimate was " in done.stderr
    assert (
        "train.per_device_train_batch_size: 128 with train.gradient_accumulation_steps: 4, which keeps the step"
        in done.stderr
    )
    assert "train.gradient_checkpointing: true" in done.stderr
