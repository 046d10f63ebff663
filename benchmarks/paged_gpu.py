"""The GB/s of attention over pages on a GPU, by tile, for decoding of many and of few sequences; sampling beside it.

    python benchmarks/paged_gpu.py [--write benchmarks/results/NAME.json]

bf16, 16 query heads, 8 key heads of 128, pages of 16 in random places. Keys and values are read once a call, so bytes are
2 x 2 x 8 x 128 a token of the contexts; 3,350 GB/s is what an H100's memory is said to give. As in generation: calls follow
each other in a CUDA graph, each over a cache of its own, and are recorded for contexts of 4,096 tokens whatever they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write

N, K, H, PAGE, V = 16, 8, 128, 16, 151_936
CASES = ((1, 600), (1, 4000), (16, 400), (64, 900), (256, 300), (256, 900))  # sequences, tokens of each at the mean
TILES = [
    {"KEYS": keys, "num_warps": warps, "num_stages": stages}
    for keys, warps, stages in itertools.product((32, 64, 128), (2, 4), (2, 3))
]

FILTERS = (
    ("", V, 1.0, 0.0),
    (", top-k 20", 20, 1.0, 0.0),
    (", top-p 0.95", V, 0.95, 0.0),
    (", all three", 20, 0.95, 0.01),
)


def microseconds(calls: list[Callable[[], Any]], times: int = 10) -> float:
    """Of each of these calls, recorded one behind the other."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / times / len(calls)


def attention(sequences: int, mean: int) -> tuple[list[Callable[[], Any]], int]:
    """Calls over caches of their own, and the bytes that each must read."""
    import torch
    from attrs import evolve
    from nanovllm_kernels import triton_paged

    from nanovllm_core.contracts import KV
    from nanovllm_core.inference.paged import paged_batch

    generator = torch.Generator().manual_seed(sequences + mean)
    contexts = sorted(torch.randint(mean // 2, mean * 3 // 2, (sequences,), generator=generator).tolist(), reverse=True)
    counts = [-(-c // PAGE) for c in contexts]
    order = iter(torch.randperm(sum(counts), generator=generator).tolist())
    pages = [list(itertools.islice(order, n)) for n in counts]
    batch = paged_batch((1,) * sequences, contexts, pages, PAGE, device="cuda")
    batch = evolve(
        batch, paging=evolve(batch.paging, exact=False, contexts=(4096,) * sequences, runs=(-1,) * sequences)
    )
    size = 4 * K * H * sum(contexts)
    caches = [
        KV(*(torch.randn(sum(counts), PAGE, K, H, dtype=torch.bfloat16, device="cuda") for _ in "kv"))
        for _ in range(max(4, min(28, (1 << 30) // size)))
    ]
    q, k, v = (torch.randn(sequences, n, H, dtype=torch.bfloat16, device="cuda") for n in (N, K, K))
    return [lambda kv=kv: triton_paged.paged_attention(q, k, v, batch, kv) for kv in caches], size


def sampling(rows: int) -> dict[str, float]:
    """Microseconds of torch's and of Triton's; with filters of Triton's alone, as torch's waits for the device."""
    import torch
    from nanovllm_kernels import torch_sampling, triton_sample

    from nanovllm_core.contracts import Draws

    logits, found = 3 * torch.randn(rows, V, dtype=torch.bfloat16, device="cuda"), {}
    for name, k, p, least in FILTERS:
        draws = Draws(
            temperature_B=torch.full((rows,), 0.6, device="cuda"), top_k_B=torch.full((rows,), k, device="cuda"),
            top_p_B=torch.full((rows,), p, dtype=torch.float64, device="cuda"),
            min_p_B=torch.full((rows,), least, device="cuda"),
            u_B2=torch.rand(rows, 2, dtype=torch.float64, device="cuda"), drawn=True,
            filtered_R=torch.arange(rows, device="cuda") if name else None,
        )  # fmt: skip
        found[f"triton{name}"] = microseconds([lambda draws=draws: triton_sample.sample(logits, draws)] * 4)
        if not name:
            found["torch"] = microseconds([lambda draws=draws: torch_sampling.sample(logits, draws)] * 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    import torch
    from nanovllm_kernels import triton_paged

    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "attention": {}, "sampling": {}}
    for sequences, mean in CASES:
        calls, size = attention(sequences, mean)
        table, kept = {}, triton_paged.ONE
        for tile in TILES:
            triton_paged.ONE = tile
            table[str(tile)] = microseconds(calls)
        triton_paged.ONE = kept
        del calls
        figures["attention"][f"{sequences} x {mean}"] = {
            tile: {"us": round(us, 2), "GB/s": round(size / us / 1e3)} for tile, us in table.items()
        }
        best = sorted(table.items(), key=lambda row: row[1])[:4]
        print(sequences, "x", mean, "ours", round(table[str(dict(kept))], 2), "best", best, flush=True)
    for rows in (1, 16, 256):
        figures["sampling"][rows] = {k: round(v, 1) for k, v in sampling(rows).items()}
    print(json.dumps(figures["sampling"]))
    write(args.write, figures)


if __name__ == "__main__":
    main()
