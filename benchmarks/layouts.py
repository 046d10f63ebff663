"""One run on one, two and four ranks, however laid out: the same losses; saved on any layout, gone on with on any other.

    python benchmarks/layouts.py [--steps 50] [--pairs all|N] [--seed 1] [--out FILE]

The run: a random Llama with tied embeddings, documents of unlike length, four micro-batches a step, clipping, fp32 on CPU.
Each rank is a real process, with gloo between them. First the losses of every step against one rank's. Then pairs (A, B):
A trains half the steps, B goes on: its later losses against one rank's; weights and moments that B has loaded against the
files, bit for bit; the sequences that both were given, each as often as with one rank. Last with `train.deterministic` on 1, 2 and
4 ranks, unbroken and gone on with on another number: every loss and the weights bit-identical. Exit code 1 where anything is
off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tiny_run
from tiny_run import child, wait

LAYOUTS: dict[str, tuple[int, str]] = {
    "one": (1, "single"),
    "ddp2": (2, "ddp"),
    "ddp4": (4, "ddp"),
    "fsdp2": (2, "fsdp"),
    "fsdp4": (4, "fsdp"),
    "tensor2": (2, "tensor"),
    "2x2": (4, "{use: mesh, shard: 2, tensor: 2}"),
}
PAIRED = ("one", "ddp2", "fsdp2", "fsdp4", "tensor2", "2x2")
BOUND = {"tensor2": 1e-5, "2x2": 1e-5}  # of the relative difference of a loss; others:
EXACT = 1e-6
RECIPE = """\
data: {path: docs, max_seq_length: 48, chunk_overlap: 8, min_chunk_size: 8, eval_fraction: 0.2}
tokenizer: {use: bpe, size: 300}
model: {use: pretrained, path: base}
train:
  learning_rate: 1.0e-3
  lr_scheduler_type: constant
  warmup_steps: 0
  per_device_train_batch_size: 1
  global_batch_size: 4
  gradient_clipping: 0.5
  eval_steps: 10
  save_steps: 1000
  logging_steps: 1
  rank_timeout: 60
callbacks: [metrics]
output_dir: out
"""


def make(folder: Path) -> None:
    """Documents, base model and recipe; the parent made ready to fork."""
    tiny_run.make(folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert wait(child(lambda: base(folder / "base"), folder / "base.log")) == 0, (folder / "base.log").read_text()
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401


def base(folder: Path) -> int:
    """A random model with tied embeddings, whose heads split in two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return 0


def run(folder: Path, layout: str, out: str, steps: int, *more: str) -> None:
    """The command on all ranks of a layout; each notes its sequences, and what it has loaded."""
    world, parallel = LAYOUTS[layout]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> int:
        if world > 1:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        os.chdir(folder)
        observe(folder / f"{out}.{number}", world)
        from nanovllm_core.cli import main

        sets = (f"output_dir={out}", f"parallel={parallel}", f"train.max_steps={steps}", *more)
        return main(["run", "recipe.yaml", *(word for s in sets for word in ("--set", s))])

    logs = [folder / f"{layout}.{number}.log" for number in range(world)]
    children = [child(lambda n=number: rank(n), logs[number]) for number in range(world)]
    codes = [wait(pid, 300) for pid in children]
    told = "".join(f"\n[{n}: exit {code}] {logs[n].read_text()[-2500:]}" for n, code in enumerate(codes) if code)
    assert not told, f"{layout}: {told}"


def observe(notes: Path, world: int) -> None:
    """Let this process note the sequences that it reads in training, and the state that it loads."""
    from nanovllm_core import job
    from nanovllm_core.data import batches

    notes.mkdir(exist_ok=True)
    taken, load = batches._part, job.load_optimizer

    def part(sequences: Any, rank: int, size: int) -> Any:
        mine = taken(sequences, rank, size)
        with (notes / "sequences.txt").open("a") as file:
            file.writelines(f"{rank} {s}\n" for s in mine)
        return mine

    def loaded(folder: Path, optimizer: Any, named: Any, *rest: Any) -> None:
        from safetensors.torch import save_file

        from nanovllm_core.training.sharding import whole

        named = list(named)
        load(folder, optimizer, named, *rest)
        state = {f"{key}:{n}": v for n, p in named for key, v in optimizer.state[p].items()} | dict(named)
        save_file({name: whole(t.detach()).contiguous() for name, t in state.items()}, notes / "loaded.safetensors")

    batches._part, job.load_optimizer = part, loaded


def losses(folder: Path, out: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x} | {
        -x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x
    }


def sequences(folder: Path, out: str, layout: str) -> Counter[str]:
    """What all data ranks were given; the ranks of a tensor group are given the same."""
    seen: dict[str, Counter[str]] = {}
    for number in range(LAYOUTS[layout][0]):
        lines = (folder / f"{out}.{number}" / "sequences.txt").read_text().splitlines()
        mine = Counter(line.partition(" ")[2] for line in lines)
        data_rank = lines[0].partition(" ")[0]
        assert seen.setdefault(data_rank, mine) == mine, (
            f"{layout}: ranks of one tensor group were given other sequences"
        )
    return sum(seen.values(), Counter())


def worst(found: dict[int, float], wanted: dict[int, float]) -> float:
    assert found.keys() >= wanted.keys(), (sorted(found), sorted(wanted))  # the end of the first half is evaluated too
    return max(abs(found[step] - loss) / loss for step, loss in wanted.items())


def alike(folder: Path, steps: int) -> dict[str, Any]:
    """Every layout against one rank."""
    rows, wanted = {}, losses(folder, "one")
    given = sequences(folder, "one", "one")
    for layout in LAYOUTS:
        if layout == "one":
            continue
        run(folder, layout, layout, steps)
        off = worst(losses(folder, layout), wanted)
        exact = sequences(folder, layout, layout) == given
        rows[layout] = {"worst": off, "bound": BOUND.get(layout, EXACT), "sequences": exact}
        print(f"{layout:8} losses off by {off:.1e}  {'' if exact else 'SEQUENCES DIFFER'}", flush=True)
    return rows


def resharded(folder: Path, pairs: list[tuple[str, str]], steps: int) -> list[dict[str, Any]]:
    """Half on A, half on B."""
    from safetensors.torch import load_file

    rows = []
    wanted, given = losses(folder, "one"), sequences(folder, "one", "one")
    for first, second in pairs:
        for old in folder.glob("pair*"):
            shutil.rmtree(old)
        run(folder, first, "pair", steps // 2)
        before = sequences(folder, "pair", first)
        for old in folder.glob("pair.*"):
            shutil.rmtree(old)
        run(folder, second, "pair", steps)
        saved: dict[str, Any] = {}
        for file in (folder / "pair" / f"checkpoint-{steps // 2}").glob("*.safetensors"):
            saved |= load_file(file)
        equal = True
        for number in range(LAYOUTS[second][0]):
            held = load_file(folder / f"pair.{number}" / "loaded.safetensors")
            equal &= held.keys() == saved.keys() and all(held[k].equal(saved[k]) for k in saved)
        off = worst(losses(folder, "pair"), wanted)
        exact = before + sequences(folder, "pair", second) == given
        bound = max(BOUND.get(layout, EXACT) for layout in (first, second))
        row = {"from": first, "to": second, "worst": off, "bound": bound, "loaded_equal": equal, "sequences": exact}
        rows.append(row)
        print(f"{first:>8} -> {second:8} off by {off:.1e}  loaded {'equal' if equal else 'DIFFERS'}", flush=True)
    return rows


def identical(folder: Path, steps: int) -> dict[str, Any]:
    """With `deterministic`: losses and weights of each world, and of runs that change it half-way."""
    import hashlib

    def ended(*layouts: str) -> tuple[dict[int, float], str]:
        for old in folder.glob("exact*"):
            shutil.rmtree(old)
        for i, layout in enumerate(layouts, 1):
            run(folder, layout, "exact", steps * i // len(layouts), "train.deterministic=true")
        digest = hashlib.sha256((folder / "exact" / "model.safetensors").read_bytes()).hexdigest()
        return {step: loss for step, loss in losses(folder, "exact").items() if step > 0}, digest

    wanted = ended("one")
    plans = [("ddp2",), ("ddp4",), ("one", "ddp2"), ("ddp4", "one"), ("ddp2", "ddp4"), ("ddp4", "ddp2")]
    rows = {" -> ".join(plan): ended(*plan) == wanted for plan in plans}
    for plan, same in rows.items():
        print(f"deterministic {plan:14} {'identical' if same else 'DIFFERS'}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", default="all", help="all, a number of random ones, or FROM-TO,FROM-TO,...")
    parser.add_argument("--layouts", action="store_true", help="leave the layouts themselves out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder, began = tiny_run.workplace("layouts"), time.perf_counter()
    try:
        make(folder)
        run(folder, "one", "one", args.steps)
        rows = {} if args.layouts else alike(folder, args.steps)
        pairs = list(itertools.permutations(PAIRED, 2))
        if args.pairs.isdigit():
            pairs = random.Random(args.seed).sample(pairs, int(args.pairs))
        elif args.pairs != "all":
            pairs = [tuple(pair.split("-")) for pair in args.pairs.split(",")]
        moved = resharded(folder, pairs, args.steps)
        exact = identical(folder, args.steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [row for row in (*rows.values(), *moved) if row["worst"] > row["bound"] or not row["sequences"]]
    wrong += [row for row in moved if not row["loaded_equal"]]
    wrong += [{"deterministic": plan} for plan, same in exact.items() if not same]
    print(f"{len(rows)} layouts, {len(moved)} pairs, {len(wrong)} wrong, {time.perf_counter() - began:.0f} s")
    figures = {"steps": args.steps, "layouts": rows, "pairs": moved, "deterministic": exact, "wrong": wrong}
    print(tiny_run.written("layouts", args.out, figures))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
