"""Generation on a CPU against `transformers.generate`: same weights, same prompts, alternating in one process.

    python benchmarks/generate_cpu.py FOLDER [--text FILE] [--steps 64] [--rounds 3] [--write benchmarks/results/NAME.json]

FOLDER holds a model of a native family. One and 16 prompts of 64 random tokens (seeded) are continued by --steps tokens
each, the likeliest every time and no end token heeded, in float32 and bfloat16. Speed is new tokens a second of the whole
call, prompts and all, as `generate` counts; the ratio is of the best rounds, since what else runs on a machine only ever
slows a round down. `plain` is ours without guessed tokens (`prompt_lookup=0`), `ours` as it comes; answers to random prompts go
round soon, which guessing likes, so --text takes eight passages of a text instead, answered one after the other, and at
batch 1 transformers may guess too (`prompt_lookup_num_tokens=8`; `lookup`). The share of bandwidth is what a step must read
of the weights at least (each matrix once, of the embedding the head alone), times steps a second of `plain`, by what this
machine reads at best: at batch 1 it says how much of the time is memory's. `load` is what the machine had to do besides.
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


def passages(folder: str, text: Path) -> list[list[int]]:
    """Eight from all over a text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    starts = range(0, len(ids) - PROMPT, (len(ids) - PROMPT) // 8)
    return [ids[at : at + PROMPT] for at in starts[:8]]


def ours(folder: str, dtype: str, kernels: Any, steps: int) -> dict[str, Any]:
    from nanovllm_core import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)

    def side(llm: Any) -> Any:
        return lambda ids: [answer["token_ids"] for answer in llm.generate(ids, params)]

    sides = {"plain": 0, "ours": None}
    return {name: side(LLM(folder, dtype=dtype, kernels=kernels, prompt_lookup=n)) for name, n in sides.items()}


def theirs(folder: str, dtype: str, steps: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(ids: list[list[int]], **options: Any) -> list[list[int]]:
        given = torch.tensor(ids)
        with torch.inference_mode():
            found = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                pad_token_id=0, eos_token_id=None, **options,
            )  # fmt: skip
        return found[:, PROMPT:].tolist()

    return {"transformers": run, "lookup": lambda ids: run(ids, prompt_lookup_num_tokens=8)}


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
    """All sides in turn; tokens a second, best and median."""
    tokens = {side: run(ids[:1]) for side, run in sides.items()}  # warm
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    loads = []
    for _ in range(rounds):
        for side, run in sides.items():
            took = seconds(lambda run=run, side=side: tokens.update({side: run(ids)}))
            speeds[side].append(len(ids) * steps / took)
        loads.append(round(os.getloadavg()[0], 2))
    first, second = tokens["ours"], tokens["transformers"]
    same = sum(a == b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    result: dict[str, Any] = {}
    for side in ("ours", "plain"):
        name = "ratio" if side == "ours" else "plain_ratio"
        result[f"{name}_best"] = round(max(speeds[side]) / max(speeds["transformers"]), 3)
        result[f"{name}_median"] = round(statistics.median(speeds[side]) / statistics.median(speeds["transformers"]), 3)
    for side, found in speeds.items():
        result[f"{side}_best"], result[f"{side}_median"] = round(max(found), 1), round(statistics.median(found), 1)
        result[f"{side}_rounds"] = [round(s, 1) for s in found]
    return {**result, "same_tokens": round(same / (len(ids) * steps), 3), "load": loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, help="a file to take prompts from, for single answers")
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
        sides = {**ours(args.folder, dtype, kernels, args.steps), **theirs(args.folder, dtype, args.steps)}
        single = {name: lambda ids, run=run: [run([one])[0] for one in ids] for name, run in sides.items()}
        several = {name: run for name, run in sides.items() if name != "lookup"}
        cases = {f"batch {n}": (single if n == 1 else several, n, prompts(n, config.vocab_size)) for n in BATCHES}
        if args.text:
            cases["text, batch 1"] = single, 1, passages(args.folder, args.text)
        for case, (those, batch, ids) in cases.items():
            found = measure(those, ids, args.steps, args.rounds)
            steps_a_second = found["plain_best"] / batch
            found["share_of_bandwidth"] = round(weights_bytes(args.folder, dtype) * steps_a_second / bandwidth, 3)
            table[f"{dtype} {case}"] = found
            speeds = ", ".join(f"{side} {found[f'{side}_best']:.1f}" for side in those)
            print(
                f"{dtype} {case}: {speeds} tokens/s; ratio {found['ratio_best']:.2f} (median {found['ratio_median']:.2f}), plain "
                f"{found['plain_ratio_best']:.2f} ({found['plain_ratio_median']:.2f}), load {found['load'][-1]}",
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
