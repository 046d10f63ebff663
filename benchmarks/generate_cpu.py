"""Generation on a CPU against `transformers.generate`: same weights, same prompts, alternating in one process.

    python benchmarks/generate_cpu.py FOLDER [--steps 64] [--rounds 3] [--write benchmarks/results/NAME.json]

FOLDER holds a model of a native family. One and 16 prompts of 64 random tokens (seeded) are continued by --steps tokens
each, the likeliest every time and no end token heeded, in float32 and bfloat16. Speed is new tokens a second of the whole
call, prompts and all, as `generate` counts; the ratio is of the best rounds, since what else runs on a machine only ever
slows a round down. The share of bandwidth is what a step must read of the weights at least (each matrix once, of the
embedding the head alone), times steps a second, by what this machine reads at best: at batch 1 it says how much of the
time is memory's. `load` is what the machine had to do besides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import processor, write

PROMPT, BATCHES, SEED = 64, (1, 16), 0
DTYPES = ("float32", "bfloat16")


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab_size, (batch, PROMPT), generator=generator).tolist()


def ours(folder: str, dtype: str, kernels: Any, steps: int) -> Any:
    from nanovllm_core import LLM, SamplingParams

    llm = LLM(folder, dtype=dtype, kernels=kernels)
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    return lambda ids: [answer["token_ids"] for answer in llm.generate(ids, params)]


def theirs(folder: str, dtype: str, steps: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(ids: list[list[int]]) -> list[list[int]]:
        given = torch.tensor(ids)
        with torch.inference_mode():
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return found[:, PROMPT:].tolist()

    return run


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def read_bandwidth() -> float:
    """Bytes a second of a sum over 400 MB, at best of ten."""
    import torch

    memory = torch.ones(100_000_000)
    memory.sum()
    return memory.nbytes / min(seconds(memory.sum) for _ in range(10))


def weights_bytes(folder: str, dtype: str) -> int:
    """Bytes of weights that a step reads at least: all but an embedding that is not the head too."""
    from nanovllm_core import LLM

    shape = LLM(folder).plan.shape
    read = shape.parameters - (0 if shape.tied else shape.vocab_size * shape.hidden)
    return read * {"float32": 4, "bfloat16": 2}[dtype]


def measure(sides: dict[str, Any], ids: list[list[int]], steps: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn; tokens a second, best and median."""
    tokens = {side: run(ids[:1]) for side, run in sides.items()}  # warm
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    loads = []
    for _ in range(rounds):
        for side, run in sides.items():
            took = seconds(lambda run=run, side=side: tokens.update({side: run(ids)}))
            speeds[side].append(len(ids) * steps / took)
        loads.append(round(os.getloadavg()[0], 2))
    first, second = tokens.values()
    same = sum(a == b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    result: dict[str, Any] = {"ratio_best": round(max(speeds["ours"]) / max(speeds["transformers"]), 3)}
    result["ratio_median"] = round(statistics.median(speeds["ours"]) / statistics.median(speeds["transformers"]), 3)
    for side, found in speeds.items():
        result[f"{side}_best"], result[f"{side}_median"] = round(max(found), 1), round(statistics.median(found), 1)
        result[f"{side}_rounds"] = [round(s, 1) for s in found]
    return {**result, "same_tokens": round(same / (len(ids) * steps), 3), "load": loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto", help="as in a recipe: a name, or JSON")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    kernels = json.loads(args.kernels) if args.kernels.startswith("{") else args.kernels

    import torch
    import transformers

    bandwidth = read_bandwidth()
    table: dict[str, Any] = {}
    for dtype in DTYPES:
        config = transformers.AutoConfig.from_pretrained(args.folder)
        sides = {
            "ours": ours(args.folder, dtype, kernels, args.steps),
            "transformers": theirs(args.folder, dtype, args.steps),
        }
        for batch in BATCHES:
            found = measure(sides, prompts(batch, config.vocab_size), args.steps, args.rounds)
            steps_a_second = found["ours_best"] / batch
            found["share_of_bandwidth"] = round(weights_bytes(args.folder, dtype) * steps_a_second / bandwidth, 3)
            table[f"{dtype} batch {batch}"] = found
            print(
                f"{dtype} batch {batch}: ours {found['ours_best']:.1f} tokens/s, transformers "
                f"{found['transformers_best']:.1f}, ratio {found['ratio_best']:.2f} (median {found['ratio_median']:.2f}), "
                f"{found['share_of_bandwidth']:.0%} of the bandwidth, load {found['load'][-1]}",
                flush=True,
            )
    about = {
        "date": datetime.date.today().isoformat(),
        "model": Path(args.folder).name,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "read_gb_a_second": round(bandwidth / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": PROMPT,
        "steps": args.steps,
        "rounds": args.rounds,
        "kernels": kernels,
    }
    write(args.write, {**about, **table})


if __name__ == "__main__":
    main()
