"""The `lean` kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl


@frozen(kw_only=True, eq=False)
class Lean:
    """SwiGLU in fp32 that keeps one activation for its backward instead of two."""

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """swiglu on a CPU, to train in fp32."""
        if request.operation != "swiglu":
            return Refuse("is a kernel for swiglu alone")
        if request.device != "cpu":
            return Refuse(f"device {request.device!r}: made for cpu (it looks at values, for which a GPU would wait)")
        if request.dtype != "float32":
            return Refuse(
                f"dtype {request.dtype!r}: float32 alone (a bf16 product has lost too many bits to be undone)"
            )
        if not request.training:
            return Refuse("saves memory in training; generation keeps nothing anyway")
        return Accept(1, "keeps one activation instead of two")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """`swiglu(gate, up)`."""
        from nanovllm_swiglu.lean import swiglu

        return swiglu
