"""Generation with a KV cache gives what a full forward gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nanovllm_models.preset import Preset

from nanovllm_core.contracts import Batch, Module

Build = Callable[..., Module]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("prompts", [(7,), (4, 4, 4), (1, 9, 5)])
def test_prefill_and_decode_equal_full_forwards(
    build: Build, pack: Callable[..., Batch], make_kv: Callable[..., Any], family: str, prompts: tuple[int, ...]
) -> None:
    torch.manual_seed(sum(prompts))
    model = Preset(size="tiny", family=family)
    shape = model.shape(50)
    module, steps = build(model, shape), 6
    sequences = [torch.randint(0, 50, (n + steps,)) for n in prompts]
    kv = make_kv(shape, len(prompts), max(prompts) + steps)
    with torch.inference_mode():
        full = [module(s, pack(len(s))) for s in sequences]
        lengths = torch.tensor(prompts)
        slots = torch.arange(len(prompts)).repeat_interleave(lengths)
        first = pack(*prompts, select=lengths.cumsum(0) - 1)
        batch = Batch(
            positions=first.positions, lengths=prompts, cu_seqlens=first.cu_seqlens, select=first.select, slots=slots
        )
        logits = module(torch.cat([s[:n] for s, n in zip(sequences, prompts, strict=True)]), batch, kv)
        for step in range(steps + 1):
            for row, n in enumerate(prompts):
                assert (logits[row] - full[row][n + step - 1]).abs().max() <= 1e-4
            if step < steps:
                positions = lengths + step
                batch = Batch(
                    positions=positions, lengths=(1,) * len(prompts), slots=torch.arange(len(prompts)),
                    cu_seqlens=torch.arange(len(prompts) + 1, dtype=torch.int32), context=int(positions.max()) + 1,
                )  # fmt: skip
                logits = module(torch.stack([s[n + step] for s, n in zip(sequences, prompts, strict=True)]), batch, kv)
