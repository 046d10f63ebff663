"""CPU training speed against `transformers.Trainer`: same model, same unpadded tokens, alternating in one run.

    python benchmarks/train_cpu.py [--rounds 3] [--steps 10] [--out benchmarks/results/NAME.json]

Model: Qwen3 of 4 layers, hidden 256, MLP 768, 4 heads and 2 key/value heads of 64, vocabulary 8192, tied: the `tiny`
preset. Sequence 512, batch 8, AdamW, one optimizer step a batch. Each measurement is a process of its own (so that its
peak memory is its own); the two sides take turns, and the ratio is taken round by round, so a machine whose speed
drifts does not decide it. Speed is tokens a second from the end of the warm-up steps to the end of the last.
Needs the development extra (accelerate).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import processor, write

SEQUENCE, BATCH, VOCABULARY, WARMUP = 512, 8, 8192, 3
RATE = 1e-3


def tokens(steps: int):
    import torch

    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (steps * BATCH, SEQUENCE), generator=generator)


def speed(ends: list[float]) -> float:
    timed = ends[WARMUP - 1 :]
    return BATCH * SEQUENCE * (len(timed) - 1) / (timed[-1] - timed[0])


def ours(precision: str, steps: int) -> dict[str, float]:
    import torch

    from nanovllm_core.assemble import assemble
    from nanovllm_core.contracts import IGNORE, Batch, MicroBatch, Step
    from nanovllm_core.machine import Machine
    from nanovllm_core.plan_model import plan_model
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Registry
    from nanovllm_core.training.schedule import Schedule
    from nanovllm_core.training.trainer import Settings, Trainer

    recipe = Recipe.from_data({
        "model": {"use": "preset", "size": "tiny"},
        "tokenizer": {"use": "bpe", "size": VOCABULARY},
        "train": {"mixed_precision": precision},
    })  # fmt: skip
    plan = plan_model(recipe, Registry.from_environment(), Machine.detect())
    rows, ends, losses = tokens(steps), [], []
    targets = rows.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    batch = Batch(
        positions=torch.arange(SEQUENCE).repeat(BATCH),
        lengths=(SEQUENCE,) * BATCH,
        cu_seqlens=torch.arange(0, BATCH * SEQUENCE + 1, SEQUENCE, dtype=torch.int32),
    )

    class Rows:
        def step(self, position: int) -> Step:
            part = slice(position, position + BATCH)
            trained = BATCH * (SEQUENCE - 1)
            micro = MicroBatch(
                tokens=rows[part].flatten(), targets=targets[part].flatten(), batch=batch, trained=trained
            )
            return Step(
                micro_batches=(micro,),
                trained=trained,
                tokens=BATCH * SEQUENCE,
                next_position=position + BATCH,
                epoch=0.0,
            )

    class Clock:
        def step_done(self, step, metrics):
            ends.append(time.perf_counter())
            losses.append(metrics["loss"])

        def note(self, text): ...

    settings = Settings(
        schedule=Schedule(kind="constant", total=steps, warmup=0), learning_rate=RATE, weight_decay=0.01, betas=(0.9, 0.95),
        clipping=1.0, logging_steps=1, eval_steps=steps + 1, save_steps=steps + 1,
    )  # fmt: skip
    model = assemble(plan, "cpu", seed=0, training=True)
    Trainer(model, Rows(), settings, Clock(), None).run(lambda trainer: None)
    return {"tokens_per_second": speed(ends), "loss": losses[-1], "parameters": plan.shape.parameters}


def theirs(precision: str, steps: int) -> dict[str, float]:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = Qwen3Config(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    model, ends = Qwen3ForCausalLM(config), []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir="/tmp/nanovllm-benchmark-trainer", per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.01, adam_beta2=0.95, max_grad_norm=1.0, bf16=precision == "bf16",
        use_cpu=True, report_to=[], logging_steps=steps, save_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(steps)]
    result = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {"tokens_per_second": speed(ends), "loss": result.training_loss, "parameters": model.num_parameters()}


def measure(side: str, precision: str, steps: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--precision", precision, "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=10, help="after the warm-up steps are taken off, those that are timed"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        result = (ours if args.side == "ours" else theirs)(args.precision, args.steps)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    table = {}
    for precision in ("fp32", "bf16"):
        rounds = []
        for _ in range(args.rounds):
            a, b = measure("ours", precision, args.steps + WARMUP), measure("theirs", precision, args.steps + WARMUP)
            rounds.append((a, b))
            ratio = a["tokens_per_second"] / b["tokens_per_second"]
            print(
                f"{precision}: ours {a['tokens_per_second']:,.0f} tokens/s {a['peak_mb']:,.0f} MB, "
                f"Trainer {b['tokens_per_second']:,.0f} tokens/s {b['peak_mb']:,.0f} MB, ratio {ratio:.2f}",
                flush=True,
            )
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in rounds]
        table[precision] = {
            "ratio_median": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
            **{
                f"{side}_{key}": round(statistics.median(pair[i][key] for pair in rounds), 1)
                for i, side in enumerate(("ours", "trainer"))
                for key in ("tokens_per_second", "peak_mb")
            },
        }
        print(f"{precision}: median ratio {table[precision]['ratio_median']}", flush=True)
    import torch
    import transformers

    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": args.rounds,
        "steps": args.steps,
    }
    write(args.out, {**about, **table})


if __name__ == "__main__":
    main()
