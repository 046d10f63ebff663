"""Kernels under test, loaded as the plan loads them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
from nanovllm_kernels.torch import Torch

from nanovllm_core.contracts import GENERATION, OPERATIONS, Batch, KernelRequest, Ops, Shape

SHAPE = Shape(
    family="qwen3", vocab_size=97, layers=2, hidden=48, heads=4, kv_heads=2, head_dim=12, intermediate=64, tied=True,
    max_positions=64, parameters=0, operations=OPERATIONS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own inputs, the same ones each time."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def make_ops() -> Callable[[str], Ops]:
    """dtype -> every operation of the `torch` component on the CPU."""

    def make(dtype: str) -> Ops:
        requests = {
            name: KernelRequest(operation=name, device="cpu", dtype=dtype, shape=SHAPE)
            for name in (*OPERATIONS, *GENERATION)
        }
        return Ops(dtype=dtype, **{name: Torch().load(request) for name, request in requests.items()})

    return make


@pytest.fixture
def pack() -> Callable[..., Batch]:
    """Document lengths -> the batch of them."""

    def make(*lengths: int) -> Batch:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])
        return Batch(positions=positions, lengths=lengths, cu_seqlens=ends.to(torch.int32))

    return make
