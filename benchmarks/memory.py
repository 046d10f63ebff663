"""The memory estimate against what training takes: growth of the process on a CPU, torch's allocator on a GPU.

    python benchmarks/memory.py                       # on a CPU: 109 M parameters, with and without checkpointing
    python benchmarks/memory.py --device cuda         # on a GPU: three sizes, each with and without checkpointing

Needs nothing but the repository: it puts itself and plugins/* on the path and names its components itself. Each measurement
is a process of its own. On a CPU it takes a step with a model of another size first, so that libraries and threads are
there, then notes its resident memory, builds the model, takes three steps, and reads the kernel's high-water mark. On a GPU
it reads `max_memory_allocated` of the same. Sequences are packed from documents of 1/2, 1/4, 1/8 ... of their length.
Results go to $OUT/memory-DEVICE.json where OUT is set, else to --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(path) for path in (ROOT / "plugins").iterdir())]

CASES = {  # options of the preset, vocabulary, length of a sequence, sequences of a micro-batch
    "109M": ({"size": "medium", "intermediate": 1024}, 8192, 512, 2),
    "234M": ({"size": "medium"}, 32768, 512, 2),
    "gpu-42M": ({"size": "small"}, 32768, 2048, 8),
    "gpu-234M": ({"size": "medium"}, 32768, 2048, 8),
    "gpu-1.3B": ({"size": "large", "tied": False}, 32768, 2048, 4),
}
DEFAULT = {"cpu": ["109M"], "cuda": ["gpu-42M", "gpu-234M", "gpu-1.3B"]}


def planned(options: dict, vocabulary: int, device: str, precision: str):
    from nanovllm_kernels.torch import Torch
    from nanovllm_models.preset import Preset
    from nanovllm_parallel.single import Single
    from nanovllm_tokenizers.bpe import Bpe

    from nanovllm_core.machine import Machine
    from nanovllm_core.plan_model import plan_model
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Registry

    registry = Registry.of(
        models={"preset": Preset(**options)}, tokenizers={"bpe": Bpe(size=vocabulary)}, kernels={"torch": Torch()},
        parallel={"single": Single()},
    )  # fmt: skip
    recipe = Recipe.from_data({"model": "preset", "tokenizer": "bpe", "train": {"mixed_precision": precision}})
    return plan_model(recipe, registry, Machine(device=device))


def steps_of(length: int, rows: int, vocabulary: int, device: str):
    import torch

    from nanovllm_core.contracts import IGNORE, Batch, MicroBatch, Step

    documents, left = [], length
    while left > 16:
        documents.append(left // 2)
        left -= left // 2
    lengths = tuple([*documents, left] * rows)
    total = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)

    class Steps:
        def step(self, position: int) -> Step:
            tokens = torch.randint(0, vocabulary, (total,))
            targets = tokens.roll(-1)
            targets[ends - 1] = IGNORE
            batch = Batch(
                positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
                lengths=lengths,
                cu_seqlens=torch.cat([torch.zeros(1), ends]).to(device, torch.int32),
            )
            trained = total - len(lengths)
            micro = MicroBatch(tokens=tokens.to(device), targets=targets.to(device), batch=batch, trained=trained)
            return Step(micro_batches=(micro,), trained=trained, tokens=total, next_position=position + 1, epoch=0.0)

        def sources(self, position: int):
            return ()

    return Steps()


def train(plan, device: str, length: int, rows: int, checkpointing: bool, steps: int = 3) -> int:
    """The most bytes that a step held, as the run tells it."""
    from nanovllm_core.assemble import assemble
    from nanovllm_core.training.schedule import Schedule
    from nanovllm_core.training.trainer import Settings, Trainer

    peaks = []

    class Silent:
        def step_done(self, step, metrics):
            peaks.append(metrics["peak_memory_bytes"])

        def note(self, text):
            print(text, file=sys.stderr)

    settings = Settings(
        schedule=Schedule(kind="constant", total=steps, warmup=0), learning_rate=1e-4, weight_decay=0.01, betas=(0.9, 0.95),
        clipping=1.0, logging_steps=1, eval_steps=steps, save_steps=steps, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    model = assemble(plan, device, seed=0, training=True)
    data = steps_of(length, rows, plan.shape.vocab_size, device)
    Trainer(model, data, settings, Silent(), None).run(lambda trainer: None)
    return max(peaks)


def measure(case: str, device: str, precision: str, checkpointing: bool) -> dict[str, float]:
    from nanovllm_core.estimate import training_memory
    from nanovllm_core.heap import give_back

    give_back()  # as `nanovllm run` does for what is measured here
    options, vocabulary, length, rows = CASES[case]
    plan = planned(options, vocabulary, device, precision)
    tiny = planned({"size": "tiny"}, 1000, device, precision)
    if device == "cpu":
        train(tiny, device, 64, 2, checkpointing)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
        began = resident("VmRSS")
        train(plan, device, length, rows, checkpointing)
        measured = resident("VmHWM") - began
    else:
        measured = train(plan, device, length, rows, checkpointing)  # torch's own peak begins anew at each logged step
    memory = training_memory(
        plan.shape, tokens=length * rows, dtype=plan.dtype, device=device, gradient_checkpointing=checkpointing
    )
    return {
        "case": case, "parameters": plan.shape.parameters, "dtype": plan.dtype, "tokens": length * rows,
        "gradient_checkpointing": checkpointing, "measured_mb": round(measured / 1e6, 1),
        "estimated_mb": round(memory.total / 1e6, 1), "off": round(memory.total / measured - 1, 4),
        "moments_mb": {name: round(size / 1e6, 1) for name, size in memory.moments.items()},
    }  # fmt: skip


def resident(key: str) -> int:
    """Bytes, of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=["kept", "recomputed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    cases = args.case or DEFAULT[args.device]
    if args.one:
        print(json.dumps(measure(cases[0], args.device, precision, args.one == "recomputed")))
        return
    rows = []
    for case in cases:
        for how in ("kept", "recomputed"):
            command = [sys.executable, __file__, "--device", args.device, "--case", case, "--precision", precision]
            done = subprocess.run([*command, "--one", how], check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    import torch

    name = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    about = {
        "date": datetime.date.today().isoformat(), "device": name, "python": platform.python_version(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows,
    }  # fmt: skip
    out = args.out or (Path(os.environ["OUT"]) / f"memory-{args.device}.json" if "OUT" in os.environ else None)
    if out:
        out.write_text(json.dumps(about, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
