"""The `onednn` kernels: generation on a CPU, where the weights' way from memory and the number of small calls are the cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from attrs import frozen

from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl

DTYPES = ("float32", "bfloat16")
OPERATIONS = ("linear", "norm_linear", "rms_norm", "rotary", "swiglu")
PRIVATE = ("_reorder_linear_weight", "_linear_pointwise")  # of torch.ops.mkldnn


@frozen(kw_only=True, eq=False)
class OneDnn:
    """Projections, norms, rotation and SwiGLU for generation on a CPU.

    packed: the matrices of which a second copy is kept in oneDNN's own layout. "none"; "head", the one to the vocabulary;
        "all", as much memory again as the model has (for bfloat16 on a CPU without its instructions twice as much). null:
        in float32 "all" where that is an eighth of the free memory at most, else "head"; in bfloat16 "all" on a CPU with
        its instructions, else "none".
    """

    packed: Literal["none", "head", "all"] | None = None

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """Accepts at priority 10 what it implements, to generate on a CPU whose torch has oneDNN."""
        if request.device != "cpu":
            return Refuse(f"it is for a CPU, the device is {request.device!r}")
        if request.training:
            return Refuse("it is for generation: it keeps copies of weights, which training changes at every step")
        if request.operation not in OPERATIONS:
            return Refuse(f"it does not implement {request.operation!r}")
        if request.dtype not in DTYPES:
            return Refuse(f"dtype {request.dtype!r} is not one of {', '.join(DTYPES)}")
        if request.tensor > 1:
            return Refuse("it is for one process: tensor parallelism slices the matrices")
        if reason := _lacks():
            return Refuse(reason)
        return Accept(10, "fewer bytes and fewer calls a token than torch's own operations")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """The callable of one operation."""
        from nanovllm_kernels import onednn_ops
        from nanovllm_kernels.onednn_products import products

        home: Any = onednn_ops
        if request.operation in ("linear", "norm_linear"):
            home = products(request.dtype, request.shape, self.packed)
        found: Callable[..., Any] = getattr(home, request.operation)
        return found


@lru_cache
def _lacks() -> str:
    """What this build of torch has not; empty where nothing is missing."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN (torch.backends.mkldnn)"
    missing = [name for name in PRIVATE if not hasattr(torch.ops.mkldnn, name)]
    return f"this torch has no torch.ops.mkldnn.{missing[0]}" if missing else ""
