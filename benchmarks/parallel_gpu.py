"""Tokens a second and peak memory of each layout, on all GPUs that torchrun starts a rank for.

    torchrun --nproc-per-node 2 benchmarks/parallel_gpu.py [--models 0.6b,4b] [--layouts ddp,fsdp,tensor] [--out FILE]
    python benchmarks/parallel_gpu.py --layouts single       one GPU, to compare with

Models of the Qwen3-0.6B and Qwen3-4B shapes, random weights, random tokens, sequences of 2,048, bf16 compute over fp32
masters, AdamW and clipping, through the trainer's own step. On several nodes start it on each, as torchrun says; a layout
is a strategy's name with its options, as in a recipe. What an earlier layout leaves in a process counts in the peak of the
next, so for peaks start each by itself; a FILE that is there gets more rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nanovllm_core.assemble import fill
from nanovllm_core.contracts import Batch, KernelRequest, MicroBatch, Ops, ParallelRequest, Shape, Step
from nanovllm_core.estimate import training_memory
from nanovllm_core.hooks import bound
from nanovllm_core.hookspecs import Kernels, Parallel
from nanovllm_core.recipe import Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.settings import settings_of
from nanovllm_core.slots import Slots
from nanovllm_core.training.deterministic import deterministically
from nanovllm_core.training.trainer import Trainer
from nanovllm_core.training.world import World

LENGTH = 2048
MODELS = {  # hidden, layers, heads, kv_heads, MLP, sequences in a micro-batch
    "0.6b": (1024, 28, 16, 8, 3072, 16),
    "4b": (2560, 36, 32, 8, 9728, 2),
}


def outline(name: str) -> Any:
    from nanovllm_models.config import TransformerConfig

    hidden, layers, heads, kv_heads, intermediate, _ = MODELS[name]
    return TransformerConfig(
        family="qwen3", vocab_size=151_936, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=128,
        intermediate=intermediate, tied=True, max_positions=LENGTH, norm_eps=1e-6,
    )  # fmt: skip


class Told:
    """Whom the loop tells."""

    def __getattr__(self, name: str) -> Any:
        return lambda **told: None


class Tokens:
    """The same micro-batch of random tokens, anew for each rank."""

    def __init__(self, rows: int, data_rank: int, data_size: int) -> None:
        torch.manual_seed(data_rank)
        ids = torch.randint(0, 151_936, (rows * LENGTH + 1,), device="cuda")
        lengths = (LENGTH,) * rows
        batch = Batch(
            positions=torch.arange(LENGTH, device="cuda").repeat(rows),
            lengths=lengths,
            cu_seqlens=torch.arange(0, rows * LENGTH + 1, LENGTH, device="cuda", dtype=torch.int32),
        )
        micro = MicroBatch(tokens=ids[:-1], targets=ids[1:], batch=batch, trained=rows * LENGTH)
        whole = rows * LENGTH * data_size
        self.made = Step(micro_batches=(micro,), trained=whole, tokens=whole, next_position=0, epoch=0.0)

    def step(self, position: int) -> Step:
        return self.made

    def sources(self, position: int) -> list[str]:
        return []


def measure(name: str, layout: str, world: World, warm: int, steps: int, deterministic: bool = False) -> dict[str, Any]:
    from nanovllm_models.config import outline as shape_of

    config, rows = outline(name), MODELS[name][-1]
    shape: Shape = shape_of(config, dtype="float32")
    recipe = Recipe.from_data({"parallel": parsed(layout), "train": {"gradient_checkpointing": name == "4b"}})
    registry = Registry.from_environment()
    slots = Slots(registry, recipe)
    strategy = bound(Parallel, slots.named("parallel", recipe.parallel).component)
    kernels = bound(Kernels, slots.named("kernels", Component(use="torch")).component)
    accept = strategy.probe(
        request=ParallelRequest(
            world_size=world.size,
            device="cuda",
            shape=shape,
            memory_needed=0,
            memory_available=0,
            deterministic=deterministic,
        )
    )
    spread = accept.layout
    requests = {
        op: KernelRequest(operation=op, device="cuda", dtype="bfloat16", shape=shape, tensor=spread.tensor)
        for op in shape.operations
    }
    ops = Ops(dtype="bfloat16", **{op: kernels.load(request=request) for op, request in requests.items()})
    with torch.device("meta"):
        module = config.build(ops)
    model = strategy.parallelize(module=module, layout=spread, mesh=world.mesh(spread, "cuda"))
    shapes = {n: p.shape for n, p in model.module.named_parameters()}
    fill(
        model.module,
        lambda n: torch.ones(shapes[n], device="cuda") if "norm" in n else torch.randn(shapes[n], device="cuda") * 0.02,
        "cuda",
        lambda mine: mine.clone().contiguous(),
    )
    model.ready()
    trainer = Trainer(
        model, Tokens(rows, model.data_rank, model.data_size), settings_of(recipe.train, warm + steps), Told(), None
    )
    model.module.train(True)
    torch.cuda.reset_peak_memory_stats()
    for n in range(warm + steps):
        if n == warm:
            torch.cuda.synchronize()
            began = time.perf_counter()
        trainer.step = n
        figures = trainer._optimize(trainer.steps.step(0))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens = trainer.steps.step(0).tokens
    estimated = training_memory(
        shape, tokens=rows * LENGTH, dtype="bfloat16", device="cuda", gradient_checkpointing=name == "4b", mixed=False,
        layout=spread,
    )  # fmt: skip
    peaks = world.everyone(f"{name}/{layout}", torch.cuda.max_memory_allocated() / 2**30)
    return {
        "model": name, "parameters": shape.parameters, "layout": layout, "ranks": world.size,
        "data": spread.data, "shard": spread.shard, "tensor": spread.tensor, "sequences_a_rank": rows,
        "gradient_checkpointing": name == "4b", "deterministic": deterministic,
        "tokens_per_second": round(tokens * steps / seconds),
        "seconds_a_step": round(seconds / steps, 4), "peak_gib": round(max(peaks), 2),
        "estimated_gib": round(estimated.total / 2**30, 2), "loss": round(figures["loss"], 4),
    }  # fmt: skip


def parsed(layout: str) -> Any:
    from nanovllm_core.yamltext import parse

    return parse(layout, "--layouts").data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="0.6b,4b")
    parser.add_argument("--layouts", default="ddp;fsdp;tensor", help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    world, rows = World.join(), []
    if args.deterministic:
        deterministically("cuda")
    world.be_patient(120.0)
    with world.connected("cuda"):
        for name in args.models.split(","):
            for layout in args.layouts.split(";"):
                if name == "4b" and layout in ("single", "ddp"):
                    continue  # 64 GB of weights, gradients and moments on each device
                try:
                    rows.append(measure(name, layout, world, 3, args.steps, args.deterministic))
                except torch.cuda.OutOfMemoryError as e:
                    rows.append({"model": name, "layout": layout, "ranks": world.size, "error": str(e).split(".")[0]})
                if world.first:
                    print(json.dumps(rows[-1]), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    if world.first and args.out:
        if args.out.exists():
            rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"] + rows
        told = {
            "benchmark": "parallel_gpu", "date": date.today().isoformat(), "command": " ".join(sys.argv),
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "rows": rows,
        }  # fmt: skip
        args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    world.leave()


if __name__ == "__main__":
    main()
