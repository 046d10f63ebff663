"""The fine-tuning recipe on the real SmolLM2 and a part of the real handbook."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASSETS = os.environ.get("NANOVLLM_ASSETS")
pytestmark = pytest.mark.skipif(not ASSETS, reason="NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)")
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-handbook.yaml"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder and the printed text of four steps on six pages."""
    base = tmp_path_factory.mktemp("smollm2")
    pages = sorted(Path(ASSETS, "debian-handbook").glob("*.txt"), key=lambda p: p.stat().st_size)
    (base / "pages").mkdir()
    for page in pages[20:26]:
        shutil.copy(page, base / "pages")
    sets = {
        "data.path": base / "pages",
        "data.max_seq_length": 256,
        "data.eval_fraction": 0.3,
        "model.path": Path(ASSETS, "smollm2-135m"),
        "output_dir": base / "out",
        "train.max_steps": 4,
        "train.warmup_steps": 0,
        "train.per_device_train_batch_size": 1,
        "train.mixed_precision": "fp32",
        "train.save_steps": 100,
        "generate.max_tokens": 8,
    }
    command = [sys.executable, "-m", "nanovllm_core.cli", "run", str(RECIPE)]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base / "out", done.stdout


def test_held_out_perplexity_falls_and_is_printed(tuned):
    folder, printed = tuned
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
    assert after < before < 100
    assert f"held-out perplexity: {before:,.2f} before, {after:,.2f} after" in printed


def test_transformers_opens_it_with_the_same_logits_and_the_same_text(tuned):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nanovllm_core import LLM, SamplingParams
    from nanovllm_core.contracts import Batch

    folder, _ = tuned
    stored = json.loads((folder / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"  # as the base model's
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    llm = LLM(folder, dtype="float32")
    for prompt in ("To install a package with apt, run", "The capital of France is"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        n = ids.shape[1]
        batch = Batch(positions=torch.arange(n), lengths=(n,), cu_seqlens=torch.tensor([0, n], dtype=torch.int32))
        with torch.no_grad():
            # logits are up to 40; products of other kernels add up in another order
            torch.testing.assert_close(llm.module(ids[0], batch), model(ids).logits[0], rtol=0, atol=3e-4)
        theirs = model.generate(ids, max_new_tokens=16, do_sample=False)[0, n:].tolist()
        ours = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16))[0]["token_ids"]
        assert ours == theirs
