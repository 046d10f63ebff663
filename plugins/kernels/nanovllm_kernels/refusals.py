"""Why a request is refused, where components share the reasons; light, for probes."""

from __future__ import annotations

from nanovllm_core.contracts import KernelRequest


def not_bf16_attention_on_cuda(request: KernelRequest, largest: int) -> str:
    """Empty for attention on CUDA in bf16 with heads of up to `largest` in multiples of 8."""
    head = request.shape.head_dim
    if request.device != "cuda":
        return f"needs a CUDA device, not {request.device!r}"
    if request.operation != "attention":
        return "is a kernel for attention alone"
    if request.dtype != "bfloat16":
        return f"computes in bfloat16, not {request.dtype} (train.mixed_precision: bf16)"
    if head > largest or head % 8:
        return f"takes heads of up to {largest} in multiples of 8, not {head}"
    return ""
