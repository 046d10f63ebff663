"""The `torch` kernels: every operation in plain PyTorch, the reference that any faster kernel must agree with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import GENERATION, OPERATIONS, Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16")


@frozen(kw_only=True, eq=False)
class Torch:
    """Every operation in plain PyTorch, on CPU and CUDA."""

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """Accepts every operation of the contract at priority 0, so that any specialised kernel wins over it."""
        for what, given, allowed in (
            ("operation", request.operation, (*OPERATIONS, *GENERATION)),
            ("device", request.device, DEVICES),
            ("dtype", request.dtype, DTYPES),
        ):
            if given not in allowed:
                return Refuse(f"{what} {given!r} is not one of {', '.join(allowed)}")
        return Accept(0, "reference in plain torch")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """The callable of one operation. All but `embedding` follow the dtype of what they are given."""
        from functools import partial

        import torch

        from nanovllm_kernels import torch_attention, torch_loss, torch_ops, torch_paged, torch_sampling

        operations: dict[str, Callable[..., Any]] = {
            "embedding": partial(torch_ops.embedding, dtype=getattr(torch, request.dtype)),
            "linear": torch_ops.linear,
            "rms_norm": torch_ops.rms_norm,
            "layer_norm": torch_ops.layer_norm,
            "rotary": torch_ops.rotary,
            "swiglu": torch_ops.swiglu,
            "gelu": torch_ops.gelu,
            "attention": torch_attention.attention,
            "paged_attention": torch_paged.paged_attention,
            "sample": torch_sampling.sample,
            "linear_cross_entropy": torch_loss.linear_cross_entropy,
        }
        return operations[request.operation]
