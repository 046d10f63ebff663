"""The `triton` kernels: what a GPU does in fewer passes over memory than torch's operations one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl
from nanovllm_kernels.refusals import fails

DTYPES = ("float32", "bfloat16")
SOURCES = {
    "linear": "products",
    "rms_norm": "triton_norm",
    "norm_linear": "triton_norm_linear",
    "layer_norm": "triton_layer_norm",
    "rotary": "triton_rotary",
    "norm_rotary": "triton_rotary",
    "swiglu": "triton_swiglu",
    "swiglu_linear": "triton_swiglu",
    "gelu": "triton_gelu",
    "linear_cross_entropy": "triton_loss",
    "paged_attention": "triton_paged",
    "sample": "triton_sample",
}


@frozen(kw_only=True, eq=False)
class Triton:
    """Norms, rotation, SwiGLU, GELU, projections, the loss in few passes, attention over pages, and sampling, on CUDA."""

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """Accepts at priority 20 what it implements; on a CPU only where Triton's interpreter is on (TRITON_INTERPRET=1)."""
        if request.device != "cuda" and not (request.device == "cpu" and _interpreted()):
            return Refuse(f"Triton compiles for a GPU, the device is {request.device!r}")
        if request.operation not in SOURCES:
            return Refuse(f"it does not implement {request.operation!r}")
        if request.dtype not in DTYPES:
            return Refuse(f"dtype {request.dtype!r} is not one of {', '.join(DTYPES)}")
        if find_spec("triton") is None:
            return Refuse("triton is not installed: pip install triton")
        if request.device == "cpu":
            return Accept(-10, "Triton's interpreter: for tests, slow")
        if reason := _fails():
            return Refuse(reason)
        return Accept(20, "fewer passes over memory than torch's operations one by one")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """The callable of one operation."""
        from importlib import import_module

        found: Callable[..., Any] = getattr(
            import_module(f"nanovllm_kernels.{SOURCES[request.operation]}"), request.operation
        )
        return found


@lru_cache
def _fails() -> str:
    """Triton compiles at first use, for which it needs a C compiler and Python's headers."""
    return fails("triton", _try)


def _try(device: str) -> None:
    import torch

    from nanovllm_kernels.triton_sums import column_sums

    column_sums(torch.ones(2, 2, dtype=torch.bfloat16, device=device))


def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1"
