"""Sampling: the token that the two numbers fall on, however the sums are rounded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import evolve

from nanovllm_core.testing.kernel_cases import KernelTests

if TYPE_CHECKING:
    import torch

    from nanovllm_core.contracts import Draws, KernelRequest

Filter = tuple[int | None, float, float]  # top-k, top-p, min-p
VOCABULARIES = (1, 2, 97, 1000, 4097)
FILTERS: Sequence[Filter] = (
    (None, 1.0, 0.0),
    (5, 1.0, 0.0),
    (None, 0.7, 0.0),
    (None, 1.0, 0.05),
    (40, 0.9, 0.01),
    (None, 1 - 1e-7, 0.0),
)
TINY = 1e-45  # a temperature
NEAR = 2e-6  # as far as sums in fp32 may move a border


class SamplingTests(KernelTests):
    vocabularies: Sequence[int] = VOCABULARIES
    each: int = 6
    """rows of each filter"""

    def test_draws_what_the_numbers_fall_on(self) -> None:
        """Each token drawn has some weight where its numbers fall, or next to it by as much as sums are rounded."""
        import torch

        from nanovllm_core.testing.reference import sample

        for request in self.of_devices():
            for vocabulary in self.vocabularies:
                logits, draws = self.rows(request, vocabulary)
                function = self.load(request)
                found = function(logits, draws)
                if vocabulary < 100 and getattr(function, "recordable", False):  # it goes by what stands on the device
                    rows_B = torch.arange(len(logits), device=logits.device)
                    same = torch.equal(found, function(logits, evolve(draws, filtered_R=rows_B)))
                    self.check(
                        same,
                        f"sample of {vocabulary} tokens: filtered_R named rows that ask for nothing, and another token came",
                        "where `sample.recordable`, filtered_R are rows that may have filters",
                    )
                self.check(
                    found.dtype == torch.int64 and found.shape == (len(logits),),
                    f"sample gave {found.dtype} {list(found.shape)}",
                    "a token a row, int64",
                )
                near = itertools.product((0.0, -NEAR, NEAR), repeat=2)
                ok = torch.zeros_like(found, dtype=torch.bool)
                while not bool(ok.all()) and (by := next(near, None)):
                    moved_B2 = (draws.u_B2 + torch.tensor(by, device=found.device)).clamp(0, 1 - 2**-53)
                    ok |= found == sample(logits, evolve(draws, u_B2=moved_B2))
                bad = (~ok).nonzero()[:, 0].tolist()
                told = (
                    f"sample of {vocabulary} tokens on {request.device}: rows {bad[:5]} drew {found[bad[:5]].tolist()}"
                )
                self.check(not bad, told, "the first number chooses a stretch, the second a token in it")

    def test_draws_greedily_and_tells_damage(self) -> None:
        import torch

        for request in self.of_devices():
            logits = torch.tensor(
                [[1.0, 3.0, 3.0], [9.0, -1.0, 2.0], [0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0]]
            )
            for heat in (0.0, TINY):
                draws = self.draws([heat] * 4, [(None, 1.0, 0.0)] * 4, 3, request.device)
                found = self.load(request)(logits.to(request.device), draws)[1 if heat else 0 :].tolist()
                wanted = [1, 0, -1, -1][1 if heat else 0 :]
                told = f"at temperature {heat:g}: {found}, expected {wanted}"
                self.check(found == wanted, told, "the first of the largest; -1 where it is not finite")

    def of_devices(self) -> list[KernelRequest]:
        """Neither a model's dtype nor its shape matters here."""
        return list({request.device: request for request in self.requests("sample", training=False)}.values())

    def rows(self, request: KernelRequest, vocabulary: int) -> tuple[torch.Tensor, Draws]:
        """Rows of all filters, flat and peaked, part of wider rows as those of a padded vocabulary; even vocabularies in bf16."""
        import torch

        generator = torch.Generator().manual_seed(vocabulary)
        filters = [f for f in FILTERS for _ in range(self.each)]
        heats = [(0.0, 0.3, 0.6, 1.0, 1.7, 8.0)[i % 6] for i in range(len(filters))]
        logits = torch.full((len(filters), vocabulary + 3), torch.nan)
        logits[:, :vocabulary] = 3 * torch.randn(len(filters), vocabulary, generator=generator)
        draws = self.draws(heats, filters, vocabulary, request.device)
        dtype = torch.float32 if vocabulary % 2 else torch.bfloat16
        return logits.to(request.device, dtype)[:, :vocabulary], draws

    def draws(self, heats: list[float], filters: Sequence[Filter], vocabulary: int, device: str) -> Draws:
        import torch

        from nanovllm_core.contracts import Draws

        ks, ps, shares = zip(*filters, strict=True)
        u_B2 = torch.rand(len(heats), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        rows = [i for i, (h, f) in enumerate(zip(heats, filters, strict=True)) if h > 0 and f != (None, 1.0, 0.0)]
        return Draws(
            temperature_B=torch.tensor(heats).to(device),
            top_k_B=torch.tensor([min(k or vocabulary, vocabulary) for k in ks]).to(device),
            top_p_B=torch.tensor(ps, dtype=torch.float64).to(device),
            min_p_B=torch.tensor(shares).to(device),
            u_B2=u_B2.to(device),
            drawn=any(heats),
            filtered_R=torch.tensor(rows).to(device) if rows else None,
        )  # fmt: skip
