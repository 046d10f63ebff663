"""The component: what it accepts, what it refuses, and that listing it stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest
from attrs import evolve
from nanovllm_kernels.torch import Torch

from nanovllm_core.contracts import OPERATIONS, Accept, KernelRequest, Refuse, Shape

REQUEST = KernelRequest(
    operation="linear", device="cpu", dtype="float32",
    shape=Shape(family="llama", vocab_size=8, layers=1, hidden=4, heads=1, kv_heads=1, head_dim=4, intermediate=8,
                tied=True, max_positions=8, parameters=0, operations=OPERATIONS),
)  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accepts_every_operation(operation: str, device: str, dtype: str) -> None:
    request = evolve(REQUEST, operation=operation, device=device, dtype=dtype)
    assert Torch().probe(request) == Accept(0, "reference in plain torch")
    assert callable(Torch().load(request))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"operation": "conv"}, "conv"), ({"device": "tpu"}, "tpu"), ({"dtype": "float16"}, "float16")],
)
def test_refuses_the_unknown_by_name(change: dict[str, str], named: str) -> None:
    verdict = Torch().probe(evolve(REQUEST, **change))
    assert isinstance(verdict, Refuse)
    assert repr(named) in verdict.why


def test_the_class_is_light() -> None:
    code = "import sys, nanovllm_kernels.torch; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
