"""Why a request is refused, where components share the reasons; light, for probes."""

from __future__ import annotations

import os
from collections.abc import Callable

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


def fails(what: str, trial: Callable[[str], object]) -> str:
    """What a trial on this process's GPU says; empty where it passes, or there is no GPU here to try it on.

    A package may not load, a build may lack a size, a compiler may not be there.
    """
    import torch

    if not torch.cuda.is_available():
        return ""
    rank = int(os.environ.get("LOCAL_RANK", 0))  # ranks have not chosen their GPU yet
    device = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        with torch.cuda.device(device):
            trial(device)
            torch.cuda.synchronize()
    except Exception as e:  # whatever a stranger's code raises is its reason
        return f"{what} fails on a trial call: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return ""
