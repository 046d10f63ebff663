"""Model FLOPs of training, from a model's outline, and what a device could do: together they give its utilisation (MFU).

MFU = tokens/s x FLOPs a token / peak FLOP/s (of all devices), where a multiplication and an addition are two FLOPs and a
backward is twice its forward (Chowdhery et al., PaLM, 2022, appendix B):

- A parameter of a matrix that tokens are multiplied by: 2 forward, 2 for the gradient of the input, 2 for its own: 6 a
  token. The head is one, tied or not, for every token; a table that is only looked up (the embedding of an untied model,
  learned positions), norms and biases are none.
- A token that attends to another (or itself): 2 x head_dim for its score and 2 x head_dim for the weighted value forward,
  twice that backward, so 12 x head_dim a head and layer. A causal document of n tokens has n(n + 1)/2 such pairs, about
  n^2/2, which makes 6 x n^2 x heads x head_dim x layers; with a window of w < n tokens, w(w + 1)/2 + (n - w)w. Documents of
  a batch are counted each by itself, as attention never crosses them.

What is computed again (`gradient_checkpointing`, the scores of fused attention) does not count: that is the point of model
FLOPs. Neither is anything taken off for frozen parameters, whose own gradients are not made: with these MFU is too high.
Where only some blocks have a window it is taken for all, and MFU is too low.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import MappingProxyType

from attrs import frozen

from nanovllm_core.contracts import Shape

PEAKS = MappingProxyType(
    {
        r"NVIDIA B200": 2250e12,
        r"NVIDIA H200|NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
        r"NVIDIA H100 PCIe": 756e12,
        r"NVIDIA A100(-SXM4-|-PCIE-|-SXM-| )(40|80)GB( PCIe)?": 312e12,
        r"NVIDIA L40S": 362e12,
        r"NVIDIA L4": 121e12,
        r"NVIDIA GeForce RTX 4090": 165e12,
    }
)
"""A device's whole name -> FLOP/s of dense bf16 products that add in fp32, by the vendor's data sheets. Slices (MIG), laptop
and other editions have other names and other peaks."""


@frozen(kw_only=True)
class Flops:
    """What training costs a model, forward and backward."""

    token: int  # in products with its parameters
    pair: int  # in attention, over all heads and layers
    window: int | None = None

    def of(self, lengths: Iterable[int]) -> int:
        """Of documents of so many tokens."""
        return sum(n * self.token + pairs(n, self.window) * self.pair for n in lengths)


def flops_of(shape: Shape) -> Flops | None:
    """By the outline; None where it does not tell what the model multiplies by (its own operations, experts).

    A block is taken to be attention over query, key, value and output matrices and one MLP, as the operations that the
    outline lists say: of two matrices with `gelu`, of three with `swiglu`.
    """
    mlp = {"gelu": 2, "swiglu": 3}.keys() & set(shape.operations)
    if len(mlp) != 1 or not {"linear", "attention"} <= set(shape.operations):
        return None
    query, cache = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = 2 * query + 2 * cache + (3 if "swiglu" in mlp else 2) * shape.intermediate
    products = shape.hidden * (shape.layers * matrices + shape.vocab_size)
    return Flops(token=6 * products, pair=12 * query * shape.layers, window=shape.window)


def pairs(length: int, window: int | None = None) -> int:
    """How often a token of a document sees a token, itself included."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def peak_of(device_name: str) -> float | None:
    """FLOP/s of bf16 products on the device, where it is known."""
    return next((peak for name, peak in PEAKS.items() if re.fullmatch(name, device_name)), None)
