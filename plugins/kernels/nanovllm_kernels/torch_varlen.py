"""The `torch_varlen` kernel: attention over packed documents by torch's own kernels, on CUDA in bf16."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl
from nanovllm_kernels.refusals import not_bf16_attention_on_cuda

LARGEST = 256  # head size


@frozen(kw_only=True, eq=False)
class TorchVarlen:
    """Attention by torch's own kernels: cuDNN for documents of one length, FlashAttention 2 for any mixture."""

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """Accepts at priority 5: below packages that are installed to be faster, above the reference."""
        if reason := not_bf16_attention_on_cuda(request, LARGEST):
            return Refuse(reason)
        import torch

        if find_spec("torch.nn.attention.varlen") is None:
            return Refuse(f"torch {torch.__version__} has no varlen_attn")
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
            return Refuse("torch's FlashAttention needs a GPU of compute capability 8.0 or newer")
        return Accept(5, "cuDNN for documents of one length, FlashAttention 2 for any mixture in one call")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """`attention(q, k, v, batch, window)`."""
        from functools import partial

        from nanovllm_kernels import packed_attention

        return partial(packed_attention.attention, packed_attention.varlen)
