"""Training speed on one GPU: ours against `transformers.Trainer`, plain, compiled, with Liger, with FlashAttention 2.

    python benchmarks/train_gpu.py [--only 'qwen3*' ...] [--steps 10] [--warm 5] [--out FILE]
    python benchmarks/train_gpu.py --list            the cases
    python benchmarks/train_gpu.py --tiny            all of them as tiny models for two steps, on a CPU too

The same shapes with random weights and new random tokens each step, AdamW (fused), clipping at 1.0, bf16 compute over fp32
masters unless a row says otherwise. Ours is planned as a recipe with `kernels: auto` would be, and makes the trainer's own
steps. A case is a process of its own, so that neither peak memory nor what was compiled is another's; one that fails or
takes more than five minutes is a row with its error. The peak is that of the whole process: making the model, warming up
and compiling too. FILE is written after each case; one that is there gets more rows, of the same device and versions only.

MFU = (6 * matmul parameters + 6 * layers * heads * head size * sequence) * tokens/s / 989.4e12: forward and backward, the
head counted once and no embedding lookup; the second part is causal attention, half of 12 * layers * width * sequence.
What gradient checkpointing computes again is not counted. The peak is that of a dense bf16 product on an H100 or H200 SXM.

A ratio compares ours with a peer of the same shape and variant (plain, checkpointing, 4096, bf16-weights); their batches may
differ and stand in the rows. Liger knows no GPT-2. Ours packed has documents of 20 to 2,048 tokens, other lengths in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import date
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from attrs import evolve
from train_gpu_ours import config_of, ours
from train_gpu_peers import CASES, Case, peer

LIMIT = 300.0  # seconds of a case
PEAKS = {"H100": 989.4e12, "H200": 989.4e12}
FORMULA = "(6 * matmul parameters + 6 * layers * heads * head_dim * sequence) * tokens/s / 989.4e12"
PACKAGES = ("torch", "transformers", "accelerate", "triton", "liger_kernel", "flash_attn")


# ---------------------------------------------------------------- in a case's own process


def measured(case: Case, warm: int, steps: int) -> dict[str, Any]:
    """The case's row."""
    import torch

    torch.manual_seed(1)
    told = (ours if case.side == "ours" else peer)(case, warm, steps)
    config, shapes = config_of(case), config_of(case).parameter_shapes()
    if told["parameters"] != sum(map(prod, shapes.values())):
        raise RuntimeError(f"{told['parameters']:,} parameters, the outline has {sum(map(prod, shapes.values())):,}")
    positions = "transformer.wpe.weight"  # looked up; the tied embedding is the head
    matrices = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != positions)
    flops = 6 * matrices + 6 * config.layers * config.heads * config.head_dim * case.length
    seconds, gpu = told.pop("seconds"), torch.cuda.is_available()
    speed = case.batch * case.length * steps / seconds
    peak = next((value for name, value in PEAKS.items() if gpu and name in torch.cuda.get_device_name()), None)
    return {
        "tokens_per_second": round(speed), "seconds_a_step": round(seconds / steps, 4),
        "mfu": round(flops * speed / peak, 4) if peak else None,
        "peak_gib": round(max(told.pop("peak", 0), torch.cuda.max_memory_allocated()) / 2**30, 2) if gpu else None,
        "loss": round(told.pop("loss"), 4), "matmul_parameters": matrices, **told,
    }  # fmt: skip


def about() -> dict[str, Any]:
    """The device and what is installed; asked of a child, since the parent must hold nothing of the device."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions}


def inside(name: str, warm: int, steps: int, tiny: bool) -> None:
    """A child: its last line is its row."""
    try:
        row = about() if name == "about" else measured(found(name, tiny), warm, steps)
    except BaseException as e:
        row = {"error": brief(f"{type(e).__name__}: {e}")}
    print("\n" + json.dumps(row), flush=True)


# ---------------------------------------------------------------- the parent


def found(name: str, tiny: bool) -> Case:
    case = next(c for c in CASES if c.name == name)
    return evolve(case, tiny=True, batch=2, length=32) if tiny else case


def brief(text: str) -> str:
    """An error's first lines without places of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", ".../", " ".join(text.split()))[:300]


def child(name: str, warm: int, steps: int, tiny: bool) -> dict[str, Any]:
    """What a child of one case says; all that it started ends with it."""
    command = [sys.executable, __file__, "--child", name, "--warm", str(warm), "--steps", str(steps)]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # the Trainer would take all
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, *["--tiny"] * tiny], stdout=said, stderr=errors, text=True, env=env, start_new_session=True
        )
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {LIMIT:.0f} s"}
        finally:
            with suppress(ProcessLookupError):  # nothing is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        errors.seek(0)
        try:
            return json.loads(said.read().strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            return {"error": brief(f"exit code {process.returncode}: {' '.join(last)}")}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours by each peer's speed, the newest row of each; where both have one."""
    speed = {row["case"]: row["tokens_per_second"] for row in rows if "error" not in row}
    pairs = {c.name: c.counterpart for c in CASES if c.side != "ours"}
    return {name: round(speed[own] / speed[name], 3) for name, own in pairs.items() if {name, own} <= speed.keys()}


def show(rows: list[dict[str, Any]]) -> None:
    compared = ratios(rows)
    print(f"{'case':42}{'batch':>6}{'tokens/s':>10}{'MFU':>8}{'GiB':>8}{'ours to it':>12}")
    for row in {row["case"]: row for row in rows}.values():
        print(f"{row['case']:42}{row['batch']:>6}", end="")
        if "error" in row:
            print(f"  {row['error'][:120]}")
            continue
        mfu, peak, ratio = row["mfu"], row["peak_gib"], compared.get(row["case"])
        cells = f"{mfu:.1%}" if mfu else "-", f"{peak:.1f}" if peak else "-", f"{ratio:.2f}" if ratio else "-"
        print(f"{row['tokens_per_second']:>10,}{cells[0]:>8}{cells[1]:>8}{cells[2]:>12}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of case names, as a shell's")
    parser.add_argument("--steps", type=int, help="that are timed; 10, tiny 2")
    parser.add_argument("--warm", type=int, help="before them; 5, which compiling needs, tiny 1")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warm = args.warm or (1 if args.tiny else 5)
    steps = args.steps or (2 if args.tiny else 10)
    if args.child:
        inside(args.child, warm, steps, args.tiny)
        return 0
    names = [c.name for c in CASES if any(fnmatchcase(c.name, pattern) for pattern in args.only)]
    if not names:
        parser.error(f"no case is named so: {', '.join(args.only)}; --list names them")
    if args.list:
        print("\n".join(names))
        return 0
    here = {**child("about", warm, steps, False), "tiny": args.tiny}
    if "error" in here:
        raise SystemExit(here["error"])
    command = re.sub(r" --out[ =]('[^']*'|\S+)", "", shlex.join(["python", "benchmarks/train_gpu.py", *sys.argv[1:]]))
    told: dict[str, Any] = {
        "benchmark": "train_gpu", "date": date.today().isoformat(), "command": command, **here,
        "mfu": FORMULA, "ours_to_peer": {}, "rows": [],
    }  # fmt: skip
    if args.out and args.out.exists():
        older = json.loads(args.out.read_text(encoding="utf-8"))
        if differing := [key for key in here if older[key] != here[key]]:
            parser.error(f"{args.out} is of another {differing[0]}: {older[differing[0]]}; here {here[differing[0]]}")
        told["rows"], told["command"] = older["rows"], f"{older['command']}; {command}"
    print(f"{here['device']}: {', '.join(f'{k} {v}' for k, v in here['versions'].items())}", flush=True)
    for name in names:
        case = found(name, args.tiny)
        row = {"case": name, "batch": case.batch, "sequence": case.length, "warm": warm, "steps": steps}
        told["rows"].append(row | child(name, warm, steps, args.tiny))
        print(json.dumps(told["rows"][-1]), flush=True)
        told["ours_to_peer"] = ratios(told["rows"])
        if args.out:
            args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    show(told["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
