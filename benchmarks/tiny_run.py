"""What crash.py, power_loss.py and write_faults.py share: a real run of seconds, in children of a loaded parent.

The run: a random Llama (2 layers, hidden 32) in a folder of its own, fine-tuned on a dozen documents with a vocabulary of
300 made from them; 12 steps, evaluated and saved every 2, two checkpoints kept. Its learning rate climbs until it ruins
what was learned: the held-out loss is lowest after 4 steps, so the best checkpoint outlives the limit, and `best/` is
exported beside the last model.

A child is forked from a parent that has imported what a run imports and has computed nothing, so that each costs what the
run costs and not the seconds of its imports; the command line's own `main` runs in it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import random
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

OUT = "out"
WORDS = "the river runs past old mills and under a stone bridge where children fish for trout at dusk".split()  # noqa: SIM905
LITTER = (".partial", ".old", ".gone", ".moving")  # ends of names that only an unfinished run may hold
RECIPE = """\
data: {path: docs, max_seq_length: 64, chunk_overlap: 8, min_chunk_size: 8, eval_fraction: 0.25}
tokenizer: {use: bpe, size: 300}
model: {use: pretrained, path: base}
train:
  max_steps: 12
  learning_rate: 1.0
  lr_scheduler_type: constant
  warmup_steps: 11
  per_device_train_batch_size: 2
  eval_steps: 2
  save_steps: 2
  save_total_limit: 2
  logging_steps: 1
generate: {prompts: ["The river"], max_tokens: 4, temperature: 0}
callbacks: [metrics]
output_dir: out
"""


def workplace(name: str) -> Path:
    """A new folder, in memory where the system has one there: a kill leaves what the system holds, on disk or not."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=memory if os.access(memory, os.W_OK) else None))


def make(folder: Path) -> None:
    """Documents, base model and recipe, and the parent made ready: call it once, before anything else."""
    draw = random.Random(11)
    (folder / "docs").mkdir(parents=True)
    for i in range(12):
        text = " ".join(draw.choice(WORDS) for _ in range(90))
        (folder / "docs" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    names = folder / "modules.json"

    def first() -> int:
        _base_model(folder / "base")
        code = run(folder, "warm")
        names.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
        return code

    code = wait(child(first, folder / "warm.log"))
    if code:
        raise SystemExit(f"the tiny run itself fails: {(folder / 'warm.log').read_text()}")
    for name in json.loads(names.read_text()):
        with suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _base_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def run(folder: Path, out: str = OUT) -> int:
    """The command, in this process; its exit code."""
    from nanovllm_core.cli import main

    os.chdir(folder)
    return main(["run", "recipe.yaml", "--set", f"output_dir={out}"])


def child(act: Callable[[], int], log: Path) -> int:
    """Start `act` in a child whose output goes to `log`; its process id. The child exits with what `act` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int:
    """The child's exit code; below 0, the signal that ended it. After `seconds` it is killed, if it still runs."""
    if seconds is not None:
        handle = os.pidfd_open(pid)
        if not select.select([handle], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder: Path, out: str = OUT) -> dict[str, Any]:
    """What must be equal, however often a run was cut short: each loss, the weights, the pointers, and no litter."""
    root = folder / out
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "mfu", "peak_memory_bytes", "seconds_")
    kept = lambda line: {k: v for k, v in line.items() if not k.startswith(timed)}  # noqa: E731
    return {
        "metrics": [kept(line) for line in lines],
        "sha256": {
            name: hashlib.sha256((root / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "config.json", "tokenizer.json", "best/model.safetensors")
            if (root / name).exists()
        },
        "pointers": json.loads((root / "checkpoints.json").read_text()),
        "litter": sorted(str(p.relative_to(root)) for p in root.rglob("*") if is_litter(p)),
    }


def is_litter(path: Path) -> bool:
    """Whether it is what a run makes for the time being."""
    return path.name.endswith(LITTER) or path.name.startswith((".building", ".export"))


def difference(wanted: dict[str, Any], got: dict[str, Any]) -> str:
    """Where two results part; empty when they are equal."""
    return "; ".join(f"{key}: {got[key]} instead of {wanted[key]}"[:600] for key in wanted if wanted[key] != got[key])


def machine() -> dict[str, Any]:
    """Where figures were taken."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {"cpus": os.cpu_count(), "cpu": model, "system": platform.platform(), "python": platform.python_version()}


def _cpuinfo() -> Iterator[str]:
    with suppress(OSError):
        yield from Path("/proc/cpuinfo").read_text().splitlines()


def written(name: str, out: Path | None, figures: dict[str, Any]) -> Path:
    """Write a dated result beside the older ones, or to `out`."""
    day = time.strftime("%Y-%m-%d")
    path = out or Path(__file__).parent / "results" / f"{name}-{day}.json"
    command = re.sub(r" --out[ =]\S+", "", " ".join(sys.argv))  # where a result lies says nothing of it
    content = {"benchmark": name, "date": day, "command": command, "machine": machine(), **figures}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
