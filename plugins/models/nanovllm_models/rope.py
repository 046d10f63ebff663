"""Rotary position frequencies: default, linear (positions stretched) and llama3 (low frequencies stretched).

Su et al., 2021 (arXiv 2104.09864); linear: Chen et al., 2023 (arXiv 2306.15595); llama3: the Llama 3.1 release. The
order of operations, in fp32, is the one of `transformers`: at position 8,000 the last bit of a frequency moves an angle
by half a thousandth, and equal logits need equal angles.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from nanovllm_models.config import Rope


def cos_sin(rope: Rope, head_dim: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, [T, H] in fp32; the two halves of H are equal."""
    angles_TH = positions_T.to(torch.float32)[:, None] * _frequencies(rope, head_dim, positions_T.device)
    angles_TH = torch.cat((angles_TH, angles_TH), dim=1)
    return angles_TH.cos(), angles_TH.sin()


@lru_cache(maxsize=16)  # a device copy is made once, not at every forward
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position, [H / 2] in fp32."""
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / (rope.theta**exponents)
        if rope.kind == "linear":
            frequencies = frequencies / rope.factor
        elif rope.kind == "llama3":
            frequencies = _llama3(frequencies, rope)
        return frequencies.to(device)


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Wavelengths beyond original / low_factor are stretched by factor, those under original / high_factor kept."""
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > rope.original / rope.low_factor, frequencies / rope.factor, frequencies)
    smooth = (rope.original / wavelengths - rope.low_factor) / (rope.high_factor - rope.low_factor)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    kept = wavelengths < rope.original / rope.high_factor
    between = ~kept & ~(wavelengths > rope.original / rope.low_factor)
    return torch.where(between, blended, stretched)
