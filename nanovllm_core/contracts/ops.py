"""The operations that models call: what each computes, and which of them may come in one.

Kernels implement operations. A joined operation is what its parts would do one after the other; where a component offers it, it
spares passes over memory or what is kept for the backward, and where none does, `Ops` calls the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from attrs import field, frozen

if TYPE_CHECKING:
    from torch import Tensor

    from nanovllm_core.contracts.models import KV, Batch, Draws

OPERATIONS = (
    "embedding", "linear", "rms_norm", "layer_norm", "rotary", "swiglu", "gelu", "attention", "linear_cross_entropy",
)  # fmt: skip
GENERATION: Mapping[str, str] = MappingProxyType({"paged_attention": "attention", "sample": ""})
"""Operations that only generation calls -> the one that a model lists (`Shape.operations`) and that they stand for there; of
none, where the engine calls it for every model."""
JOINED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "norm_linear": ("rms_norm", "linear"),
        "norm_rotary": ("rms_norm", "rotary"),
        "swiglu_linear": ("swiglu", "linear"),
    }
)
"""Joined operation -> its parts. A model that calls one lists the parts (`Shape.operations`)."""


def _absent(operation: str) -> Callable[..., NoReturn]:
    def call(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"the model calls {operation!r} but its Shape.operations does not list it")

    return call


def _operation(name: str) -> Any:
    return field(factory=lambda: _absent(name))


@frozen(kw_only=True, eq=False)
class Ops:
    """The chosen kernels: plain callables on local tensors, one object shared by all blocks.

    embedding(ids_T, weight_VC) -> x_TC in the compute dtype
    linear(x, weight_OI, bias_O | None) -> x @ weight.T + bias in x's dtype
    rms_norm(x_..C, weight_C, eps) -> x * rsqrt(mean(x^2) + eps) * weight, statistics in fp32
    layer_norm(x_..C, weight_C, bias_C, eps) -> (x - mean) * rsqrt(variance + eps) * weight + bias, statistics in fp32
    rotary(q_TNH, k_TKH, cos_TH, sin_TH) -> (q, k) rotated by halves; cos and sin in fp32
    swiglu(gate, up) -> silu(gate) * up
    gelu(x, tanh) -> x * Phi(x), or where `tanh` its approximation by tanh
    attention(q_TNH, k_TKH, v_TKH, batch, window=None) -> o_TNH, causal within each document, scale H**-0.5;
        with `window`, a token sees itself and the window - 1 tokens before it
    paged_attention(q_TNH, k_TKH, v_TKH, batch, kv, window=None) -> o_TNH: writes the new keys and values to their places in
        the pages of `kv`, then each token attends to its sequence up to itself, as `batch.paging` tells
    sample(logits_BV, draws) -> tokens_B int64, as `draws` tells; -1 where a row's largest logit is not finite
    linear_cross_entropy(x_TC, weight_VC, targets_T) -> sum of -log softmax(x @ weight.T)[target] in fp32, IGNORE left out
    """

    dtype: str  # compute dtype
    embedding: Callable[..., Tensor] = _operation("embedding")
    linear: Callable[..., Tensor] = _operation("linear")
    rms_norm: Callable[..., Tensor] = _operation("rms_norm")
    layer_norm: Callable[..., Tensor] = _operation("layer_norm")
    rotary: Callable[..., tuple[Tensor, Tensor]] = _operation("rotary")
    swiglu: Callable[..., Tensor] = _operation("swiglu")
    gelu: Callable[..., Tensor] = _operation("gelu")
    attention: Callable[..., Tensor] = _operation("attention")
    paged_attention: Callable[..., Tensor] = _operation("paged_attention")
    sample: Callable[[Tensor, Draws], Tensor] = _operation("sample")
    linear_cross_entropy: Callable[..., Tensor] = _operation("linear_cross_entropy")
    head: Callable[..., Tensor] | None = None
    """what a strategy does in place of `logits`, where ranks hold parts of tokens and vocabulary."""
    joined: Mapping[str, Callable[..., Any]] = field(factory=dict)
    """of JOINED, those that a component does in one."""

    def attend(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, kv: KV | None, window: int | None = None
    ) -> Tensor:
        """attention among the documents of the batch, or with `kv` paged_attention."""
        if kv is None:
            return self.attention(q_TNH, k_TKH, v_TKH, batch, window=window)
        return self.paged_attention(q_TNH, k_TKH, v_TKH, batch, kv, window=window)

    def logits(self, x_TC: Tensor, weight_VC: Tensor, select: Tensor | None) -> Tensor:
        """x @ weight.T of the selected tokens (None: of all), [n, V] in the compute dtype."""
        if self.head is not None:
            return self.head(x_TC, weight_VC, select)
        return self.linear(x_TC if select is None else x_TC[select], weight_VC, None)

    def norm_linear(
        self, x_TC: Tensor, more_TC: Tensor | None, norm_C: Tensor, eps: float, *matrices: Tensor | None
    ) -> tuple[Tensor, ...]:
        """x + more (x itself without it), then linear(rms_norm(x + more)) of each weight_OC, bias_O | None in `matrices`."""
        if "norm_linear" in self.joined:
            found: tuple[Tensor, ...] = self.joined["norm_linear"](x_TC, more_TC, norm_C, eps, *matrices)
            return found
        if more_TC is not None:
            x_TC = x_TC + more_TC
        normed_TC = self.rms_norm(x_TC, norm_C, eps)
        pairs = zip(matrices[::2], matrices[1::2], strict=True)
        return x_TC, *(self.linear(normed_TC, weight, bias) for weight, bias in pairs)

    def norm_rotary(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        q_norm_H: Tensor,
        k_norm_H: Tensor,
        eps: float,
        cos_TH: Tensor,
        sin_TH: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """rotary of rms_norm(q) and rms_norm(k), each head normed by itself."""
        if "norm_rotary" in self.joined:
            found: tuple[Tensor, Tensor] = self.joined["norm_rotary"](
                q_TNH, k_TKH, q_norm_H, k_norm_H, eps, cos_TH, sin_TH
            )
            return found
        return self.rotary(self.rms_norm(q_TNH, q_norm_H, eps), self.rms_norm(k_TKH, k_norm_H, eps), cos_TH, sin_TH)

    def swiglu_linear(self, gate_TI: Tensor, up_TI: Tensor, weight_CI: Tensor, bias_C: Tensor | None) -> Tensor:
        """linear(swiglu(gate, up), weight, bias)."""
        if "swiglu_linear" in self.joined:
            found: Tensor = self.joined["swiglu_linear"](gate_TI, up_TI, weight_CI, bias_C)
            return found
        return self.linear(self.swiglu(gate_TI, up_TI), weight_CI, bias_C)
