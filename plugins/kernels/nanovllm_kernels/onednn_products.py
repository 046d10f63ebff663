"""Matrix products for generation on a CPU: each way of making one where it is the fastest.

Measured with 2 cores of a CPU with AVX2 alone and 37 GB/s, weights of 1536 x 576 from memory, in us:

| tokens | fp32: torch | turned | packed | bf16: torch | through fp32 |
| --- | --- | --- | --- | --- | --- |
| 1 | 246 | 147 | 138 | 99 | 167 |
| 2 | 384 | 150 | 148 | 186 | 193 |
| 16 | 431 | 329 | 301 | 1,430 | 311 |
| 64 | 882 | 763 | 797 | 5,692 | 769 |
| 512 | 5,011 | 5,426 | 5,520 | 55,092 | 4,964 |

Turned is (weight @ x.T).T, the same sum through the other half of the BLAS; a single token goes twice, since a product of
one column is a slower routine. It needs no memory. Packed (`onednn_packed`) doubles what the model takes, and gains most
where matrices are large (49152 x 576, one token: 3.1 ms, turned 4.5, plain 7.7) and several are one call: so all are packed
where the copies fit into an eighth of the memory that is free at loading, else the matrix to the vocabulary alone, and the
others are turned. Which of the two decides the last bits of a result. Beyond 64 tokens torch's own product is as good.

For bf16 without its instructions torch is at the memory's speed for one or two tokens and at 20 GFLOP/s beyond; there
blocks of the weight are made fp32 in 4 MB that stay in the cache, and the sum is rounded once, as ever: no copy is kept.
With its instructions all are packed, but one token reads the plain weights; that has been tried on no such CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import functional as F

from nanovllm_core.contracts import Shape
from nanovllm_core.machine import host_memory
from nanovllm_kernels import torch_ops
from nanovllm_kernels.onednn_ops import rms_norm
from nanovllm_kernels.onednn_packed import Matrices, Packed

FEW = 64  # tokens up to which products are turned
PLAIN_BF16 = 2  # tokens up to which torch multiplies bf16 at the memory's speed
BLOCK = 1 << 20  # values made fp32 at a time
SHARE = 8  # of the memory that is free: what all packed copies may take unasked

Packs = Literal["none", "head", "all"]

_memory = threading.local()


@frozen(eq=False)
class Products:
    """`linear` and `norm_linear` for one compute dtype."""

    dtype: torch.dtype
    vocab_size: int
    packs: Packs
    copies: Packed = field(factory=Packed)

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in x's dtype."""
        if x.ndim != 2 or torch.is_grad_enabled() or not x.dtype == weight_OI.dtype == self.dtype:
            return torch_ops.linear(x, weight_OI, bias_O)
        return self._each(x, (weight_OI, bias_O))[0]

    def norm_linear(
        self, x_TC: Tensor, more_TC: Tensor | None, norm_C: Tensor, eps: float, *matrices: Tensor | None
    ) -> tuple[Tensor, ...]:
        """x + more, then linear(rms_norm(x + more)) of each weight_OC, bias_O | None in `matrices`."""
        if more_TC is not None:
            x_TC = x_TC + more_TC
        normed_TC = rms_norm(x_TC, norm_C, eps)
        plain = torch.is_grad_enabled() or x_TC.dtype != self.dtype or x_TC.ndim != 2
        if plain or any(w is not None and w.dtype != self.dtype for w in matrices[::2]):
            return x_TC, *map(torch_ops.linear, [normed_TC] * (len(matrices) // 2), matrices[::2], matrices[1::2])
        return x_TC, *self._each(normed_TC, matrices)

    def _each(self, x_TI: Tensor, matrices: Matrices) -> Sequence[Tensor]:
        tokens, bf16 = x_TI.shape[0], self.dtype == torch.bfloat16
        if tokens and self._packs(matrices, tokens, bf16) and (copy := self.copies(matrices)) is not None:
            return copy.products(x_TI)
        weights = [w for w in matrices[::2] if w is not None]
        pairs = list(zip(weights, matrices[1::2], strict=True))
        if bf16 and tokens > PLAIN_BF16:
            x_IT = x_TI.float().t()
            return [_through_fp32(x_IT, w, b) for w, b in pairs]
        if bf16 or not 0 < tokens <= FEW:
            return [F.linear(x_TI, w, b) for w, b in pairs]
        x_IT = (torch.cat((x_TI, x_TI)) if tokens == 1 else x_TI).t()
        return [_turned(x_IT, w, b).t()[:tokens] for w, b in pairs]

    def _packs(self, matrices: Matrices, tokens: int, bf16: bool) -> bool:
        if bf16:
            return self.packs == "all" and tokens > 1
        if tokens > FEW or self.packs == "none":
            return False
        first = matrices[0]
        return self.packs == "all" or (first is not None and first.shape[0] == self.vocab_size)


def products(dtype: str, shape: Shape, packs: Packs | None = None, native: bool | None = None) -> Products:
    """`native`: whether the CPU has bf16 instructions; None: looked at."""
    fits = 4 * shape.parameters <= host_memory() // SHARE
    if packs is None and dtype == "bfloat16":
        packs = "all" if (native if native is not None else has_bf16()) else "none"
    return Products(getattr(torch, dtype), shape.vocab_size, packs or ("all" if fits else "head"))


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16: AVX512-bf16 or AMX, or what oneDNN says where there is neither question nor x86."""
    import platform

    if platform.machine().lower() in ("x86_64", "amd64"):
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _turned(x_IT: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """weight @ x + bias, [O, T]."""
    made = torch.mm(weight_OI, x_IT)
    return made if bias_O is None else made.add_(bias_O.unsqueeze(1))


def _through_fp32(x_IT: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """[T, O] in the weight's dtype, of an fp32 x: blocks of rows of the weight made fp32."""
    (outputs, inputs), tokens = weight_OI.shape, x_IT.shape[1]
    rows = max(1, BLOCK // inputs)
    made = torch.empty(tokens, outputs, dtype=weight_OI.dtype)
    for first in range(0, outputs, rows):
        block = weight_OI[first : first + rows]
        wide = _scratch(block.numel()).view(block.shape).copy_(block)
        bias = None if bias_O is None else bias_O[first : first + rows].float()
        product = _turned(x_IT, wide, bias).t() if tokens <= FEW else F.linear(x_IT.t(), wide, bias)
        made[:, first : first + rows] = product
    return made


def _scratch(size: int) -> Tensor:
    """fp32 memory of this thread, the same at each call."""
    kept: Tensor | None = getattr(_memory, "kept", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = _memory.kept = torch.empty(size)
    return kept[:size]
