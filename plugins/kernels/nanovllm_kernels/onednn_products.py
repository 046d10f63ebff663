"""Matrix products for generation on a CPU: each way of making one where it is the fastest.

Measured with 2 cores of a CPU with AVX2 alone and 37 GB/s, weights of 1536 x 576 from memory, in us:

| tokens | fp32: torch | turned | packed | bf16: torch | through fp32 |
| --- | --- | --- | --- | --- | --- |
| 1 | 246 | 147 | 138 | 99 | 167 |
| 2 | 384 | 150 | 148 | 186 | 193 |
| 16 | 431 | 329 | 301 | 2,800 | 311 |
| 64 | 882 | 763 | 797 | | 769 |
| 512 | 5,011 | 5,426 | 5,520 | | 4,964 |

Turned is (weight @ x.T).T, the same sum through the other half of the BLAS; a single token goes twice, since a product of
one column is a slower routine. It needs no memory, so packed copies (`onednn_packed`) are kept only where they gain much:
of the matrix to the vocabulary (49152 x 576: 3.1 ms packed, 4.5 turned, 7.7 plain). For bf16 without its instructions torch
is at the memory's speed for one or two tokens and at 20 GFLOP/s beyond; there blocks of the weight are made fp32 in 4 MB
that stay in the cache, and the sum is rounded once, as ever. With its instructions everything is packed.
"""

from __future__ import annotations

import threading
from typing import Literal

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import functional as F

from nanovllm_kernels import torch_ops
from nanovllm_kernels.onednn_ops import rms_norm
from nanovllm_kernels.onednn_packed import Packed, product

FEW = 64  # tokens up to which products are turned
PLAIN_BF16 = 2  # tokens up to which torch multiplies bf16 at the memory's speed
BLOCK = 1 << 20  # values made fp32 at a time

_memory = threading.local()


@frozen(eq=False)
class Products:
    """`linear` and `norm_linear` for one compute dtype."""

    dtype: torch.dtype
    vocab_size: int
    packs: Literal["none", "head", "all"]
    copies: Packed = field(factory=Packed)

    @classmethod
    def of(
        cls, dtype: str, vocab_size: int, packs: Literal["none", "head", "all"] | None, native: bool | None = None
    ) -> Products:
        """`native`: whether the CPU has bf16 instructions; None: looked at."""
        if packs is None and dtype == "bfloat16":
            packs = "all" if (native if native is not None else has_bf16()) else "none"
        return cls(getattr(torch, dtype), vocab_size, packs or "head")

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in x's dtype."""
        if x.ndim != 2 or self._not_ours(x, weight_OI):
            return torch_ops.linear(x, weight_OI, bias_O)
        return self._each(x, (weight_OI, bias_O))[0]

    def norm_linear(
        self, x_TC: Tensor, more_TC: Tensor | None, norm_C: Tensor, eps: float, *matrices: Tensor | None
    ) -> tuple[Tensor, ...]:
        """x + more, then linear(rms_norm(x + more)) of each weight_OC, bias_O | None in `matrices`."""
        if more_TC is not None:
            x_TC = x_TC + more_TC
        normed_TC = rms_norm(x_TC, norm_C, eps)
        if any(self._not_ours(x_TC, w) for w in matrices[::2] if w is not None):
            return x_TC, *map(torch_ops.linear, [normed_TC] * (len(matrices) // 2), matrices[::2], matrices[1::2])
        return x_TC, *self._each(normed_TC, matrices)

    def _not_ours(self, x: Tensor, weight: Tensor) -> bool:
        return torch.is_grad_enabled() or not x.dtype == weight.dtype == self.dtype

    def _each(self, x_TI: Tensor, matrices: tuple[Tensor | None, ...]) -> list[Tensor]:
        weights = [w for w in matrices[::2] if w is not None]
        biases = matrices[1::2]
        tokens, bf16 = len(x_TI), self.dtype == torch.bfloat16
        if not tokens:
            return list(map(F.linear, [x_TI] * len(weights), weights, biases))
        if self._packs(weights, tokens) and (copy := self.copies(*weights)) is not None:
            return _packed(x_TI, copy, weights, biases)
        if bf16 and tokens > PLAIN_BF16:
            x = _operand(x_TI.float(), tokens)
            return [_through_fp32(x, tokens, w, b) for w, b in zip(weights, biases, strict=True)]
        if bf16 or tokens > FEW:
            return list(map(F.linear, [x_TI] * len(weights), weights, biases))
        x = _operand(x_TI, tokens)
        return [_turned(x, tokens, w, b).t() for w, b in zip(weights, biases, strict=True)]

    def _packs(self, weights: list[Tensor], tokens: int) -> bool:
        if self.packs == "head":
            return len(weights[0]) == self.vocab_size
        return self.packs == "all" and (tokens > 1 or self.dtype != torch.bfloat16)


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16: AVX512-bf16 or AMX, or what oneDNN says where there is neither question nor x86."""
    import platform

    if platform.machine().lower() in ("x86_64", "amd64"):
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(x_TI: Tensor, copy: Tensor, weights: list[Tensor], biases: tuple[Tensor | None, ...]) -> list[Tensor]:
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    made = product(x_TI, copy, bias)
    return [made] if len(weights) == 1 else list(made.split_with_sizes([len(w) for w in weights], 1))


def _operand(x_TI: Tensor, tokens: int) -> Tensor:
    """What `_turned` and `_through_fp32` multiply by: [I, T], a single token twice."""
    return (torch.cat((x_TI, x_TI)) if tokens == 1 else x_TI).t()


def _turned(x_IT: Tensor, tokens: int, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """weight @ x + bias, [O, T]."""
    made = torch.mm(weight_OI, x_IT)
    if tokens == 1:
        made = made[:, :1]
    return made if bias_O is None else made.add_(bias_O.unsqueeze(1))


def _through_fp32(x_IT: Tensor, tokens: int, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """[T, O] in the weight's dtype, of an fp32 x: blocks of rows of the weight made fp32."""
    outputs, inputs = weight_OI.shape
    rows = max(1, BLOCK // inputs)
    made = torch.empty(tokens, outputs, dtype=weight_OI.dtype)
    for first in range(0, outputs, rows):
        block = weight_OI[first : first + rows]
        wide = _scratch(block.numel()).view(block.shape).copy_(block)
        bias = None if bias_O is None else bias_O[first : first + rows].float()
        if tokens <= FEW:
            made[:, first : first + rows] = _turned(x_IT, tokens, wide, bias).t()
        else:
            made[:, first : first + rows] = F.linear(x_IT.t(), wide, bias)
    return made


def _scratch(size: int) -> Tensor:
    """fp32 memory of this thread, the same at each call."""
    kept: Tensor | None = getattr(_memory, "kept", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = _memory.kept = torch.empty(size)
    return kept[:size]
