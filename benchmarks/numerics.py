"""fp32 losses of a run against transformers' model trained by a plain loop: same data, same weights, same rates.

    python benchmarks/numerics.py [--steps 200] [--learning-rate 5e-5] [--out benchmarks/results/NAME.json]

Both sides take the `tiny` preset from the same random weights and the documents of `nanovllm init`, packed by our data
path. The plain loop is transformers' Qwen3 with eager attention, one forward a document, the token mean by hand, torch's
clip_grad_norm_ and AdamW (not fused, foreach). A third side, the control, is the plain loop with transformers' own
`sdpa` attention: how far two right programs drift apart by rounding alone, which training amplifies step by step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from train_cpu import processor

from nanovllm_core import Machine, Recipe, Registry, make_plan
from nanovllm_core.assemble import assemble, models_of
from nanovllm_core.contracts import IGNORE, Step
from nanovllm_core.corpus import batches, count, prepare
from nanovllm_core.demo import init
from nanovllm_core.settings import settings_of
from nanovllm_core.training.trainer import Settings, Trainer


def documents(step: Step) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for micro in step.micro_batches:
        lengths = micro.batch.lengths
        yield from zip(micro.tokens.split(lengths), micro.targets.split(lengths), strict=True)


def plain(plan, steps: list[Step], s: Settings, attention: str) -> list[float]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**models_of(plan.model).config(shape=plan.model.shape))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    own = dict(assemble(plan.model, "cpu", seed=plan.recipe.train.seed, training=True).module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=s.betas, eps=1e-8)
    losses = []
    for i, step in enumerate(steps):
        summed = torch.zeros(())
        for tokens, targets in documents(step):
            logits = model(tokens[None]).logits[0]
            summed = summed + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        loss = summed / step.trained
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clipping)
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * s.schedule.share(i)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Losses:
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def step_done(self, step, metrics) -> None:
        self.steps.append(metrics["loss"])

    def note(self, text) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="5e-5 is a recipe's default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe_path, _, _ = init(Path(folder) / "demo")
        sets = [f"train.max_steps={args.steps}", f"train.learning_rate={args.learning_rate}", "train.logging_steps=1"]
        sets += ["train.mixed_precision=fp32", "data.eval_fraction=0", "callbacks=[]", "train.warmup_ratio=0.1"]
        sets += ["train.warmup_steps=null"]
        plan = make_plan(Recipe.load(recipe_path, sets=sets), Registry.from_environment(), Machine())
        corpus = prepare(plan, "x", {}, count(plan, "x", Path(folder), plan.events()), Path(folder), plan.events())
        rows = plan.sequences_per_step.value
        data = batches(plan, corpus, rows, 0, 1)
        steps = [data.step(i * rows) for i in range(args.steps)]
        s, heard = settings_of(plan.recipe.train, args.steps), Losses()
        model = assemble(plan.model, "cpu", seed=plan.recipe.train.seed, training=True)
        Trainer(model, data, s, heard, None).run(lambda trainer: None)
        eager, sdpa = (plain(plan, steps, s, attention) for attention in ("eager", "sdpa"))
    apart = {
        name: [abs(a - b) / b for a, b in zip(losses, eager, strict=True)]
        for name, losses in (("ours", heard.steps), ("control", sdpa))
    }
    table = {f"{name}_worst": max(values) for name, values in apart.items()}
    table |= {f"{name}_worst_step": values.index(max(values)) + 1 for name, values in apart.items()}
    table |= {"loss_first": eager[0], "loss_last": eager[-1], "steps": args.steps, "learning_rate": args.learning_rate}
    print(json.dumps(table, indent=1))
    about = {
        "date": datetime.date.today().isoformat(), "processor": processor(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({**about, **table, "relative": apart}, indent=1) + "\n")


if __name__ == "__main__":
    main()
