"""What every operation of `contracts.Ops` must compute: its definition, written out in plain differentiable torch.

Slow and simple on purpose: a document at a time, all logits at once. The functions compute in the dtype of what they
are given, so in float64 they are the definition that a kernel is measured against. `reference_ops` makes an `Ops` of
them that computes in float64 and rounds each result once: a model under test then shows its own mistakes alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nanovllm_core.contracts import GENERATION, IGNORE, KV, OPERATIONS, Batch, Draws, Ops


def embedding(ids_T: Tensor, weight_VC: Tensor) -> Tensor:
    return weight_VC[ids_T]


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x @ weight_OI.T if bias_O is None else x @ weight_OI.T + bias_O


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight_C


def layer_norm(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight_C + bias_C


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos_TH[:, None] + torch.cat((-b, a), -1) * sin_TH[:, None]

    return rotated(q_TNH), rotated(k_TKH)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def gelu(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return x * 0.5 * torch.erfc(-x / math.sqrt(2))  # erfc keeps the digits that 1 + erf loses far below zero


def attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, window: int | None = None) -> Tensor:
    parts = zip(*(torch.split(x, list(batch.lengths)) for x in (q_TNH, k_TKH, v_TKH)), strict=True)
    outputs = [_document(q, k, v, window) for q, k, v in parts]
    return torch.cat(outputs) if outputs else q_TNH.clone()


def paged_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, kv: KV, window: int | None = None
) -> Tensor:
    assert batch.paging is not None
    for pages_PSKH, new_TKH in ((kv.k_PSKH, k_TKH), (kv.v_PSKH, v_TKH)):
        for place, new in zip(batch.paging.places_T.tolist(), new_TKH, strict=True):
            pages_PSKH[place // pages_PSKH.shape[1], place % pages_PSKH.shape[1]] = new.to(pages_PSKH.dtype)
    found = []
    for q_LNH, table, n in zip(
        torch.split(q_TNH, list(batch.lengths)),
        batch.paging.tables_DP.long(),
        batch.paging.contexts_D.tolist(),
        strict=True,
    ):
        k_SKH, v_SKH = (pages[table].flatten(0, 1)[:n].to(q_TNH.dtype) for pages in (kv.k_PSKH, kv.v_PSKH))
        found.append(_document(q_LNH, k_SKH, v_SKH, window))
    return torch.cat(found)


def _document(q_LNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, window: int | None) -> Tensor:
    """Queries are the last L of S positions."""
    new, all_, heads = q_LNH.shape[0], k_SKH.shape[0], q_LNH.shape[1]
    k, v = (x.repeat_interleave(heads // k_SKH.shape[1], 1) for x in (k_SKH, v_SKH))
    scores_NLS = torch.einsum("lnh,snh->nls", q_LNH, k) * q_LNH.shape[-1] ** -0.5
    at_L1 = torch.arange(all_ - new, all_, device=q_LNH.device)[:, None]
    back_LS = at_L1 - torch.arange(all_, device=q_LNH.device)  # how far a key lies behind its query
    seen_LS = (back_LS >= 0) if window is None else (back_LS >= 0) & (back_LS < window)
    return torch.einsum("nls,snh->lnh", torch.softmax(scores_NLS.masked_fill(~seen_LS, -math.inf), -1), v)


def norm_linear(
    x_TC: Tensor, more_TC: Tensor | None, norm_C: Tensor, eps: float, *matrices: Tensor | None
) -> tuple[Tensor, ...]:
    x_TC = x_TC if more_TC is None else x_TC + more_TC
    normed_TC = rms_norm(x_TC, norm_C, eps)
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    return x_TC, *(linear(normed_TC, weight, bias) for weight, bias in pairs if weight is not None)


def norm_rotary(
    q_TNH: Tensor, k_TKH: Tensor, q_norm_H: Tensor, k_norm_H: Tensor, eps: float, cos_TH: Tensor, sin_TH: Tensor
) -> tuple[Tensor, Tensor]:
    return rotary(rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps), cos_TH, sin_TH)


def swiglu_linear(gate_TI: Tensor, up_TI: Tensor, weight_CI: Tensor, bias_C: Tensor | None) -> Tensor:
    return linear(swiglu(gate_TI, up_TI), weight_CI, bias_C)


def sample(logits_BV: Tensor, draws: Draws) -> Tensor:
    return torch.tensor([_drawn(row, draws, i) for i, row in enumerate(logits_BV.double())], device=logits_BV.device)


def _drawn(logits_V: Tensor, draws: Draws, row: int) -> int:
    if not torch.isfinite(logits_V.max()):
        return -1
    heat = float(draws.temperature_B[row])
    if heat == 0:
        return int(logits_V.argmax())
    vocabulary = len(logits_V)
    weights = torch.exp((logits_V - logits_V.max()) / heat).tolist()
    order = sorted(range(vocabulary), key=lambda i: (-weights[i], i))[: int(draws.top_k_B[row])]
    total, before = sum(weights[i] for i in order), 0.0
    kept: set[int] = set()
    for i in order:
        if before >= float(draws.top_p_B[row]) * total and kept:
            break
        before += weights[i]
        if weights[i] >= float(draws.min_p_B[row]) * weights[order[0]]:
            kept.add(i)
    left = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    each = math.isqrt(vocabulary - 1) + 1
    first = each * _met([sum(left[i : i + each]) for i in range(0, vocabulary, each)], float(draws.u_B2[row, 0]))
    return first + _met(left[first : first + each], float(draws.u_B2[row, 1]))


def _met(weights: list[float], u: float) -> int:
    """The first whose running sum is above this share of all."""
    sums = list(itertools.accumulate(weights))
    return next(i for i, s in enumerate(sums) if s > u * sums[-1])


def linear_cross_entropy(x_TC: Tensor, weight_VC: Tensor, targets_T: Tensor) -> Tensor:
    kept = targets_T != IGNORE
    log_probs = torch.log_softmax(x_TC[kept] @ weight_VC.T, -1)
    return -log_probs.gather(1, targets_T[kept][:, None]).sum()


DEFINITIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "embedding": embedding,
        "linear": linear,
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "rotary": rotary,
        "swiglu": swiglu,
        "gelu": gelu,
        "attention": attention,
        "paged_attention": paged_attention,
        "sample": sample,
        "linear_cross_entropy": linear_cross_entropy,
        "norm_linear": norm_linear,
        "norm_rotary": norm_rotary,
        "swiglu_linear": swiglu_linear,
    }
)


def reference_ops(dtype: str = "float32") -> Ops:
    """All operations by their definitions, computed in float64, results rounded to `dtype` (the loss to fp32)."""
    found: dict[str, Any] = {name: _rounded(name, getattr(torch, dtype)) for name in (*OPERATIONS, *GENERATION)}
    return Ops(dtype=dtype, **found)


def _rounded(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    definition = DEFINITIONS[name]
    if name == "sample":
        return definition
    result = torch.promote_types(dtype, torch.float32) if name == "linear_cross_entropy" else dtype

    def call(*args: Any, **kwargs: Any) -> Any:
        out = definition(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})
        return tuple(o.to(result) for o in out) if isinstance(out, tuple) else out.to(result)

    return call


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
