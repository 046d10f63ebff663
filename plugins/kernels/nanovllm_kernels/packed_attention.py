"""Attention over packed documents by kernels that take running lengths: FlashAttention 2 and 4, and torch's own.

A call is `packed(q_TNH, k_TKH, v_TKH, cu_seqlens, longest, window) -> o_TNH`, causal within each document. Documents
of one length go to `torch_attention` where cuDNN's kernel is as fast or faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nanovllm_core.contracts import Batch
from nanovllm_kernels import torch_attention

Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int, "int | None"], Tensor]


def attention(
    packed: Packed,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    batch: Batch,
    window: int | None = None,
) -> Tensor:
    """As `contracts.Ops.attention`."""
    longest = max(batch.lengths, default=0)
    if window is not None and window >= longest:
        window = None
    if not batch.lengths or (window is None and torch_attention.suits_cudnn(q_TNH, batch.lengths)):
        return torch_attention.documents(q_TNH, k_TKH, v_TKH, batch.lengths, window)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    return packed(q, k, v, batch.cu_seqlens, longest, window)


def flash_2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, window_size=_reach(window, -1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


def flash_4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None) -> Tensor:
    out, *_ = load_flash_4()(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
        window_size=_reach(window, None), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


@cache
def load_flash_4() -> Any:
    import warnings

    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)  # told at each compilation
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None) -> Tensor:
    """torch's own; keys and values are repeated, as torch 2.11's knows no grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out: Tensor = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=_reach(window, -1))
    return out


def _reach(window: int | None, all_of_it: Any) -> tuple[Any, int]:
    """How far a token looks back, and ahead."""
    return (all_of_it if window is None else window - 1, 0)


FLASH: Mapping[int, Packed] = MappingProxyType({2: flash_2, 4: flash_4})
