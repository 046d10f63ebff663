"""Tokenising a folder against the bare `tokenizers` library, and what a second run and a large corpus cost.

    python benchmarks/tokenise.py FOLDER [--tokenizer FOLDER] [--rounds 3] [--large MB] [--out benchmarks/results/NAME.json]

FOLDER holds .txt files. The bare side has all texts in memory and calls `encode_batch` with 2,000 of them at a time (the
library uses all cores; all at once takes it 7 GB for 50 MB of text, and longer); ours finds, reads, checks, hashes and
cuts the files, tokenises, writes the store and makes it durable. Each measurement is a process of its own, both take
turns, and the ratio is taken round by round. Without --tokenizer both use a byte-level BPE of 32,768 ids made from the
folder. Then, each in a process of its own and beyond imports: a first and a second `prepare` (vocabulary, tokens,
windows, packing) of a recipe with the `bpe` tokenizer, and the peak memory of one with that vocabulary ready-made over
50 MB and over --large MB of text, made of the folder's by repetition with another number in each line.
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
import tempfile
import time
from pathlib import Path


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def bare(folder: Path, tokenizer: Path, fast: bool) -> dict[str, float]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [p.read_bytes().decode() for p in sorted(folder.rglob("*.txt"))]
    begin = time.perf_counter()
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    for first in range(0, len(texts), 2000):
        encode(texts[first : first + 2000], add_special_tokens=False)
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak_mb()}


def ours(folder: Path, tokenizer: Path, work: Path) -> dict[str, float]:
    from nanovllm_tokenizers.hf import load

    from nanovllm_core import Recipe, Registry
    from nanovllm_core.data.store import open_or_build
    from nanovllm_core.plan_data import plan_data
    from nanovllm_core.slots import Slots

    opened, registry = load(str(tokenizer)), Registry.from_environment()
    begin = time.perf_counter()
    documents = plan_data(Slots(registry, Recipe.from_data({"data": {"path": str(folder)}})), work / "out").documents
    open_or_build(work / "tokens", "0" * 64, documents, opened)
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak_mb()}


def prepared(folder: Path, tokenizer: Path | None, work: Path) -> dict[str, float]:
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401

    from nanovllm_core import Machine, Recipe, Registry, corpus, lock, make_plan

    recipe = Recipe.from_data({
        "data": {"path": str(folder), "max_seq_length": 1024},
        "model": {"use": "preset", "size": "tiny"},
        "tokenizer": {"use": "hf", "path": str(tokenizer)} if tokenizer else {"use": "bpe", "size": 8192},
        "callbacks": [],
        "output_dir": str(work / "out"),
    })  # fmt: skip
    registry, machine = Registry.from_environment(), Machine.detect()
    before, begin = peak_mb(), time.perf_counter()
    plan = make_plan(recipe, registry, machine)
    events = plan.events()
    fingerprint = plan.data.documents.fingerprint()
    found = corpus.count(plan, fingerprint, work / "tokens", events)
    made = corpus.prepare(plan, fingerprint, lock.contents(plan), found, work / "tokens", events)
    next(iter(corpus.batches(plan, made, 8, 0, 1).step(0).micro_batches))
    return {"seconds": time.perf_counter() - begin, "peak_mb": peak_mb(), "imports_mb": before}


def apart(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def enlarged(folder: Path, to: Path, megabytes: int) -> None:
    """Files of the folder's texts, over and over, until there are so many MB; no two lines of two rounds are the same."""
    to.mkdir(parents=True)
    texts = [p.read_text("utf-8") for p in sorted(folder.rglob("*.txt"))]
    size = number = 0
    while size < megabytes << 20:
        for text in texts:
            data = "\n".join(f"{line} {number}" for line in text.split("\n")).encode()
            (to / f"{number}.txt").write_bytes(data)
            size, number = size + len(data), number + 1
            if size >= megabytes << 20:
                break


def vocabulary(folder: Path, to: Path) -> Path:
    from nanovllm_tokenizers.bpe import train

    train((p.read_bytes().decode() for p in sorted(folder.rglob("*.txt"))), 32_768).save(to)
    return to


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=0, metavar="MB")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["bare", "fast", "ours", "prepared"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        if args.side == "ours":
            print(json.dumps(ours(args.folder, args.tokenizer, args.work)))
        elif args.side == "prepared":
            print(json.dumps(prepared(args.folder, args.tokenizer, args.work)))
        else:
            print(json.dumps(bare(args.folder, args.tokenizer, args.side == "fast")))
        return
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().split("\n")
                if "model name" in line
            ),
            "?",
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "megabytes": round(sum(p.stat().st_size for p in args.folder.rglob("*.txt")) / 1e6, 1),
        "files": sum(1 for _ in args.folder.rglob("*.txt")),
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tokenizer = args.tokenizer or vocabulary(args.folder, work / "vocabulary")
        rounds = []
        for number in range(args.rounds):
            sides = {s: apart(args.folder, "--tokenizer", tokenizer, "--side", s) for s in ("bare", "fast")}
            place = work / f"store-{number}"
            sides["ours"] = apart(args.folder, "--tokenizer", tokenizer, "--side", "ours", "--work", place)
            rounds.append(sides)
            print(json.dumps(sides), file=sys.stderr)
        megabytes = float(str(result["megabytes"]))
        for side in ("bare", "fast", "ours"):
            result[f"{side}_mb_per_second"] = round(
                megabytes / statistics.median(r[side]["seconds"] for r in rounds), 2
            )
        for side in ("bare", "fast"):
            ratios = [r[side]["seconds"] / r["ours"]["seconds"] for r in rounds]
            result[f"ratio_to_{side}"] = {
                "median": round(statistics.median(ratios), 3),
                "rounds": [round(r, 3) for r in ratios],
            }
        result["peak_mb"] = {s: max(r[s]["peak_mb"] for r in rounds) for s in ("bare", "ours")}
        first, second = (apart(args.folder, "--side", "prepared", "--work", work / "prepared") for _ in range(2))
        result["seconds_before_step_1"] = {"first": round(first["seconds"], 2), "second": round(second["seconds"], 2)}
        if args.large:
            peaks = {}
            for size in (50, args.large):
                enlarged(args.folder, work / f"{size} MB", size)
                place = work / f"prepared {size}"
                run = apart(work / f"{size} MB", "--tokenizer", tokenizer, "--side", "prepared", "--work", place)
                peaks[f"{size} MB"] = {**run, "seconds": round(run["seconds"], 1)}
                print(json.dumps(peaks), file=sys.stderr)
            result["peak_memory"] = peaks
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
