"""Whether the fast kernels of a GPU train as the reference does: losses of a run, and gradients against float64.

    python benchmarks/numerics_gpu.py [--steps 300] [--device cuda] [--out benchmarks/results/NAME.json]

The run: a preset on the documents of `nanovllm init`, from the same weights and the same data, four times: with the kernels that
`auto` chooses and with `torch`'s, both in bf16; with `torch`'s in fp32; and, as the control, with `torch`'s in bf16 where a
step's sequences come one by one, which only changes the order of sums. Two right programs drift apart by rounding, which
training amplifies; so the fast one is judged right where it is no further from fp32 than 1.25 times the reference, and no
further from the reference than 1.5 times the control is (means of absolute differences over all steps).

The gradients: each operation that `auto` gives to another component, at the sizes of a real block, in bf16. Its error and the
`torch` kernel's are taken against the definition in float64, as the norm of the difference over the norm; judged right at
up to twice the reference's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from nanovllm_core import Machine, Recipe, Registry, make_plan
from nanovllm_core.assemble import assemble
from nanovllm_core.contracts import JOINED, KernelRequest, Ops
from nanovllm_core.corpus import batches, count, prepare
from nanovllm_core.demo import init
from nanovllm_core.hooks import bound
from nanovllm_core.hookspecs import Kernels
from nanovllm_core.plan import Plan
from nanovllm_core.settings import settings_of
from nanovllm_core.testing.kernel_calls import answer, calls, defined
from nanovllm_core.testing.kernel_cases import outline
from nanovllm_core.training.trainer import Trainer

BLOCK = outline(1024, 16, 8, 128, 3072, 8_000)
DOCUMENTS = (700, 5, 1024, 319)
FROM_FP32, FROM_REFERENCE, GRADIENT = 1.25, 1.5, 2.0
RUNS: Mapping[str, tuple[str, ...]] = {
    "fast": ("train.mixed_precision=bf16",),
    "reference": ("train.mixed_precision=bf16", "kernels=torch"),
    "control": ("train.mixed_precision=bf16", "kernels=torch", "train.per_device_train_batch_size=1"),
    "fp32": ("train.mixed_precision=fp32", "kernels=torch"),
}


class Heard:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return lambda **told: self.losses.append(told["metrics"]["loss"]) if name == "step_done" else None


def losses_of(
    recipe: Path, folder: Path, sets: tuple[str, ...], machine: Machine, steps: int
) -> tuple[list[float], Plan]:
    common = (
        f"train.max_steps={steps}", "train.logging_steps=1", "data.eval_fraction=0", "callbacks=[]",
        "train.global_batch_size=8", "train.per_device_train_batch_size=8", "train.learning_rate=5e-4", *sets,
    )  # fmt: skip
    plan = make_plan(Recipe.load(recipe, sets=list(common)), Registry.from_environment(), machine)
    found = prepare(plan, "x", {}, count(plan, "x", folder, plan.events()), folder, plan.events())
    data = batches(plan, found, plan.sequences_per_step.value, 0, 1)
    heard = Heard()
    model = assemble(plan.model, machine.device, seed=plan.recipe.train.seed, training=True)
    Trainer(model, data, settings_of(plan.recipe.train, steps), heard, None).run(lambda trainer: None)
    return heard.losses, plan


def apart(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def training(machine: Machine, steps: int, size: str) -> dict[str, Any]:
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe, _, _ = init(Path(folder) / "demo")
        for name, sets in RUNS.items():
            losses[name], plan = losses_of(recipe, Path(folder), (f"model.size={size}", *sets), machine, steps)
            if name == "fast":
                chosen = {operation: choice.entry.name for operation, choice in plan.model.kernels.items()}
    figures = {
        "fast from reference": apart(losses["fast"], losses["reference"]),
        "control from reference": apart(losses["control"], losses["reference"]),
        "fast from fp32": apart(losses["fast"], losses["fp32"]),
        "reference from fp32": apart(losses["reference"], losses["fp32"]),
    }
    right = (
        figures["fast from fp32"] <= FROM_FP32 * figures["reference from fp32"]
        and figures["fast from reference"] <= FROM_REFERENCE * figures["control from reference"]
    )
    last = {f"last loss, {name}": found[-1] for name, found in losses.items()}
    return {"kernels": chosen, **{k: float(f"{v:.3g}") for k, v in {**figures, **last}.items()}, "right": right}


def gradients(machine: Machine) -> list[dict[str, Any]]:
    """Each operation's errors: the largest over its inputs, ours beside torch's."""
    registry, rows = Registry.from_environment(), []
    components = {e.name: registry.load(e)() for e in registry.of_kind("kernels")}
    torch_kernels = bound(Kernels, components["torch"])
    for name, component in components.items():
        for operation in (*BLOCK.operations, *JOINED):
            request = KernelRequest(operation=operation, device=machine.device, dtype="bfloat16", shape=BLOCK)
            kernels = bound(Kernels, component)
            if name == "torch" or type(kernels.probe(request=request)).__name__ == "Refuse":
                continue
            parts = {op: torch_kernels.load(request=evolve(request, operation=op)) for op in BLOCK.operations}
            plain = getattr(Ops(dtype="bfloat16", **parts), operation)
            for call in calls(request, DOCUMENTS, seed=7):
                right = defined(operation, call, call.leaves)
                ours, reference = (
                    max(
                        float((a.double() - b).norm() / b.norm())
                        for a, b in zip(answer(f, call, call.leaves).gradients, right.gradients, strict=True)
                        if a is not None and b is not None
                    )
                    for f in (kernels.load(request=request), plain)
                )
                rows.append({
                    "operation": operation, "component": name, "call": call.label, "error": float(f"{ours:.3g}"),
                    "torch": float(f"{reference:.3g}"), "right": ours <= GRADIENT * reference,
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", default="small", help="of the preset")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    machine = Machine.detect() if on_gpu else Machine()
    found = gradients(machine)
    told = {
        "benchmark": "numerics_gpu", "date": date.today().isoformat(), "torch": torch.__version__, "steps": args.steps,
        "size": args.size, "device": torch.cuda.get_device_name() if on_gpu else "cpu", "gradients": found,
        "training": training(machine, args.steps, args.size),
    }  # fmt: skip
    print(json.dumps(told["training"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0 if told["training"]["right"] and all(row["right"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
