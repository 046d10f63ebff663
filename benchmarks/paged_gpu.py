"""The GB/s of attention over pages on a GPU, by tile, for decoding of many and of few sequences; sampling beside it.

    python benchmarks/paged_gpu.py [--write benchmarks/results/NAME.json]

bf16, 16 query heads, 8 key heads of 128, pages of 16 in random places. Keys and values are read once a call, so bytes are
2 x 2 x 8 x 128 a token of the contexts; 3,350 GB/s is what an H100's memory is said to give. Medians of 20 calls, the cache of
the card written over between two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write

N, K, H, PAGE, V = 16, 8, 128, 16, 151_936
CASES = ((1, 600), (1, 4000), (16, 400), (64, 900), (256, 300), (256, 900))  # sequences, tokens of each at the mean
TILES = [
    {"KEYS": keys, "num_warps": warps, "num_stages": stages}
    for keys, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
]


def milliseconds(call: Callable[[], Any], times: int = 20) -> float:
    import torch

    flush, found = torch.empty(64 << 20, dtype=torch.int32, device="cuda"), []
    for i in range(times + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            found.append(start.elapsed_time(end))
    return statistics.median(found)


def attention(sequences: int, mean: int, exact: bool) -> tuple[Callable[[], Any], int]:
    """A step, and the bytes that it must read."""
    import torch
    from attrs import evolve
    from nanovllm_kernels import triton_paged

    from nanovllm_core.contracts import KV
    from nanovllm_core.inference.paged import paged_batch

    generator = torch.Generator().manual_seed(sequences + mean)
    contexts = torch.randint(mean // 2, mean * 3 // 2, (sequences,), generator=generator).tolist()
    counts = [-(-c // PAGE) for c in contexts]
    order = iter(torch.randperm(sum(counts), generator=generator).tolist())
    pages = [list(itertools.islice(order, n)) for n in counts]
    batch = paged_batch((1,) * sequences, contexts, pages, PAGE, device="cuda")
    if not exact:
        paging = evolve(batch.paging, exact=False, contexts=(4096,) * sequences, runs=(-1,) * sequences)
        batch = evolve(batch, paging=paging)
    kv = KV(*(torch.randn(sum(counts), PAGE, K, H, dtype=torch.bfloat16, device="cuda") for _ in "kv"))
    q, k, v = (torch.randn(sequences, n, H, dtype=torch.bfloat16, device="cuda") for n in (N, K, K))
    return lambda: triton_paged.paged_attention(q, k, v, batch, kv), 4 * K * H * sum(contexts)


def sampling(rows: int) -> dict[str, float]:
    """Milliseconds of torch's and of Triton's."""
    import torch
    from nanovllm_kernels import torch_sampling, triton_sample

    from nanovllm_core.contracts import Draws

    logits = torch.randn(rows, V, device="cuda")
    draws = Draws(
        temperature_B=torch.full((rows,), 0.6, device="cuda"), top_k_B=torch.full((rows,), V, device="cuda"),
        top_p_B=torch.ones(rows, dtype=torch.float64, device="cuda"), min_p_B=torch.zeros(rows, device="cuda"),
        u_B2=torch.rand(rows, 2, dtype=torch.float64, device="cuda"), drawn=True, filtered_R=None,
    )  # fmt: skip
    return {
        m.__name__.split(".")[-1]: milliseconds(lambda m=m: m.sample(logits, draws))
        for m in (torch_sampling, triton_sample)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    import torch
    from nanovllm_kernels import triton_paged

    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "attention": {}, "sampling": {}}
    for sequences, mean in CASES:
        table = {}
        for exact, tile in itertools.product((True, False), TILES):
            if not exact and tile != dict(triton_paged.ONE):
                continue
            call, size = attention(sequences, mean, exact)
            kept, triton_paged.ONE = triton_paged.ONE, tile
            try:
                table[f"{'' if exact else 'recorded '}{tile}"] = round(size / milliseconds(call) / 1e6)
            finally:
                triton_paged.ONE = kept
        best = dict(sorted(table.items(), key=lambda row: -row[1])[:6])
        figures["attention"][f"{sequences} x {mean}"] = {"GB/s": table}
        print(
            f"{sequences} x {mean}",
            json.dumps(best, indent=1),
            {k: v for k, v in table.items() if "recorded" in k},
            flush=True,
        )
    for rows in (1, 16, 256):
        figures["sampling"][rows] = {k: round(v, 3) for k, v in sampling(rows).items()}
    print(json.dumps(figures["sampling"]))
    write(args.write, figures)


if __name__ == "__main__":
    main()
