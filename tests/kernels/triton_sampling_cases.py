"""Tests of sampling in Triton, for a process of their own as those of `triton_cases.py`."""

from __future__ import annotations

import pytest
import torch
from attrs import asdict
from nanovllm_kernels.triton import Triton
from nanovllm_kernels.triton_filters import limits
from nanovllm_kernels.triton_likeliest import likeliest
from torch import Tensor

from nanovllm_core.contracts import Draws, KernelRequest
from nanovllm_core.testing.kernel_cases import SHAPES
from nanovllm_core.testing.kernel_sampling import SamplingTests
from nanovllm_core.testing.reference import sample as reference_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sampled(logits_BV: Tensor, draws: Draws) -> list[int]:
    """What Triton draws."""
    request = KernelRequest(operation="sample", device=DEVICE, dtype="float32", shape=SHAPES[0], training=False)
    there = Draws(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in asdict(draws).items()})
    return Triton().load(request)(logits_BV.to(DEVICE), there).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_tokens_that_are_as_likely_filters_keep_the_first(dtype: str) -> None:
    """Logits of few values, as bf16 has them: what top-k and top-p cut through; the numbers of a row meet each token kept."""
    generator, vocabulary, rows = torch.Generator().manual_seed(4), 300, 24
    logits_BV = torch.randint(-3, 3, (rows, vocabulary), generator=generator).to(getattr(torch, dtype))
    logits_BV[:, 7] = -0.0
    draws = Draws(
        temperature_B=torch.full((rows,), 0.7),
        top_k_B=torch.tensor([(3, 60, 299, 300)[i % 4] for i in range(rows)]),
        top_p_B=torch.tensor([(1.0, 0.9, 0.3)[i % 3] for i in range(rows)], dtype=torch.float64),
        min_p_B=torch.tensor([(0.0, 0.1)[i // 16] for i in range(rows)]),
        u_B2=torch.rand(rows, 2, dtype=torch.float64, generator=generator),
        drawn=True,
        filtered_R=torch.arange(rows),  # some of them ask for nothing, as in a recorded step
    )
    assert sampled(logits_BV, draws) == reference_sample(logits_BV, draws).tolist()


def kept_of(logits_V: Tensor, heat: float, k: int, p: float, share: float) -> Tensor:
    """Which tokens filters keep, by their definition in fp64."""
    logits_V, k = logits_V.double(), min(k, len(logits_V))
    weights_V = ((logits_V - logits_V.max()) / heat).exp()
    order_K = logits_V.sort(descending=True, stable=True).indices[:k]
    before_K = weights_V[order_K].cumsum(0) - weights_V[order_K]
    kept_V = torch.zeros(len(logits_V), dtype=torch.bool)
    kept_V[order_K[(before_K < p * weights_V[order_K].sum()) | (p >= 1)]] = True
    return kept_V & (weights_V >= share)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_filters_keep_few_and_many_of_a_large_vocabulary(dtype: str) -> None:
    """Among its likeliest tokens, and where these do not hold enough."""
    vocabulary, generator = 9_000, torch.Generator().manual_seed(7)
    asked = [
        (0.7, vocabulary, 0.9, 0.0), (1.0, 20, 1.0, 0.0), (0.6, 20, 0.95, 0.02), (1.3, vocabulary // 2, 0.99, 0.01),
        (0.8, vocabulary, 1.0, 0.1), (1.0, 600, 0.5, 0.0), (0.7, vocabulary, 1.0, 0.0), (0.0, 5, 0.5, 0.0),
    ]  # fmt: skip
    heats, counts, shares, leasts = zip(*asked, strict=True)
    logits_BV = torch.tensor([[1.0], [3.0]]).repeat_interleave(8, 0) * torch.randn(16, vocabulary, generator=generator)
    logits_BV = logits_BV.to(getattr(torch, dtype)).to(DEVICE)
    draws = Draws(
        temperature_B=torch.tensor(heats * 2, device=DEVICE), top_k_B=torch.tensor(counts * 2, device=DEVICE),
        top_p_B=torch.tensor(shares * 2, dtype=torch.float64, device=DEVICE),
        min_p_B=torch.tensor(leasts * 2, device=DEVICE), u_B2=torch.zeros(16, 2, device=DEVICE), drawn=True,
        filtered_R=torch.arange(16, device=DEVICE),
    )  # fmt: skip
    bound_B, last_B = limits(logits_BV, draws)
    tokens_V = torch.arange(vocabulary)
    for row, (heat, *filters) in enumerate(asked * 2):
        logits_V, bound, last = logits_BV[row].cpu().float(), float(bound_B[row]), int(last_B[row])
        found_V = (logits_V > bound) | ((logits_V == bound) & (tokens_V <= last))
        wanted_V = kept_of(logits_V, heat, *filters) if heat else torch.ones(vocabulary, dtype=torch.bool)
        assert (found_V != wanted_V).sum() <= (filters[1] < 1), asked[row % 8]  # a sum on the border
    rows = likeliest(
        logits_BV, draws.temperature_B, draws.top_k_B, draws.top_p_B, draws.min_p_B, 16 if dtype == "bfloat16" else 32
    )[2].tolist()
    assert {0, 1} == {*rows}
    assert rows[8:11] == [0] * 3  # peaked ones


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_rows_are_told_and_spare_the_others(dtype: str) -> None:
    """Every kind of NaN, in a vocabulary of more groups than are looked at again."""
    vocabulary, generator = 9_000, torch.Generator().manual_seed(8)
    logits_BV = (3 * torch.randn(6, vocabulary, generator=generator)).to(getattr(torch, dtype))
    wide = dtype == "float32"
    bits = logits_BV.view(torch.int32 if wide else torch.int16)
    for row, kind in zip((1, 3, 4), (0x7FFFFFFF, 0x7FC00000, -1), strict=True):
        bits[row] = kind if wide else kind >> 16
    draws = Draws(
        temperature_B=torch.full((6,), 0.8), top_k_B=torch.tensor([20, 20, vocabulary, vocabulary, 20, 20]),
        top_p_B=torch.full((6,), 0.9, dtype=torch.float64), min_p_B=torch.zeros(6),
        u_B2=torch.rand(6, 2, dtype=torch.float64, generator=generator), drawn=True, filtered_R=torch.arange(6),
    )  # fmt: skip
    assert sampled(logits_BV, draws) == [
        i if row not in (1, 3, 4) else -1 for row, i in enumerate(reference_sample(logits_BV, draws).tolist())
    ]


class TestSampling(SamplingTests):
    """A row in which a stretch, or a chunk, is read by lanes that are not all there is among them."""

    component = Triton()
    operations = ("sample",)
    devices = (DEVICE,)
    vocabularies = (1, 97, 4500)
    each = 2
