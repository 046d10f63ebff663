"""Attention: documents apart to the bit, nothing seen before its time, windows, and decoding over a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from nanovllm_core.testing.kernel_cases import KernelTests

if TYPE_CHECKING:
    from nanovllm_core.contracts import KernelRequest

PACKED = (5, 1, 9, 33)
WINDOWS = (1, 5, 64)
PLACES = (0, 3, 40, 17)  # positions of the new tokens of sequences in generation


class AttentionTests(KernelTests):
    def test_documents_do_not_see_each_other(self) -> None:
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests("attention"):
            function = self.load(request)
            call, other = (calls(request, PACKED, seed=seed)[0] for seed in (0, 1))
            before, first = answer(function, call, ()).outputs[0], 0
            for length in PACKED:
                inside = slice(first, first + length)
                args = [a.clone() if isinstance(a, torch.Tensor) else a for a in call.args]
                for i in range(3):
                    args[i][inside] = other.args[i][inside]
                differs = (before != answer(function, evolve(call, args=args), ()).outputs[0]).flatten(1).any(1)
                differs[inside] = False
                told = f"{self.named(request, call)}: changing the document of {length} tokens changed others"
                self.check(not bool(differs.any()), told, "no bit crosses a document's border")
                weight = torch.zeros_like(before)
                weight[inside] = 1
                for i, gradient in enumerate(answer(function, call, (0, 1, 2), [weight]).gradients):
                    outside = torch.ones(sum(PACKED), dtype=torch.bool, device=weight.device)
                    outside[inside] = False
                    met = gradient is None or bool((gradient[outside] != 0).any())
                    told = (
                        f"{self.named(request, call)}: a document's gradient of argument {i} reaches another document"
                    )
                    self.check(not met, told, "no gradient crosses a document's border")
                first += length

    def test_later_tokens_change_nothing_before_them(self) -> None:
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests("attention"):
            function = self.load(request)
            call, other = (calls(request, (33,), seed=seed)[0] for seed in (0, 1))
            before = answer(function, call, ()).outputs[0]
            for at in (1, 16, 32):
                args = [
                    torch.cat([a[:at], b[at:]]) if isinstance(a, torch.Tensor) else a
                    for a, b in zip(call.args, other.args, strict=True)
                ]
                after = answer(function, evolve(call, args=args), ()).outputs[0]
                told = f"{self.named(request, call)}: tokens from {at} on changed what is before them"
                self.check(torch.equal(before[:at], after[:at]), told, "a token sees itself and what is before it")

    def test_looks_back_a_window(self) -> None:
        from nanovllm_core.testing.kernel_calls import calls

        for window in WINDOWS:
            for request in self.requests("attention", window=window):
                for call in calls(request, PACKED):
                    self.same(request, call, f"with window={window} a token sees itself and the {window - 1} before it")

    def test_decodes_over_a_cache(self) -> None:
        """Rows of uneven lengths; what a row does not hold is large and finite, what is no row of the batch is NaN."""
        for request in self.requests("attention", training=False):
            self.decode(request)

    def test_decodes_within_a_window(self) -> None:
        for window in WINDOWS:
            for request in self.requests("attention", training=False, window=window):
                self.decode(request)

    def test_prefill_fills_the_cache(self) -> None:
        """With a cache that answers None, keys and values go into it and documents are attended to as ever."""
        import torch

        from nanovllm_core.testing.kernel_caches import Prefilled
        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests("attention", training=False):
            call = calls(request, (5, 1, 9))[0]
            cache = Prefilled()
            function, told = self.load(request), self.named(request, call)
            found = answer(function, evolve(call, args=[*call.args, cache]), ()).outputs[0]
            alone = answer(function, call, ()).outputs[0]
            self.check(torch.equal(alone, found), f"{told}: differs with a cache", "it does not")
            self.check(len(cache.given) == 1, f"{told}: updated {len(cache.given)} times", "the cache is updated once")
            for i, kept in enumerate(cache.given[0]):
                good = torch.equal(call.args[i + 1], kept)
                self.check(good, f"{told}: other keys or values were stored", "they are stored as given")

    def decode(self, request: KernelRequest) -> None:
        import torch

        from nanovllm_core.testing.kernel_caches import Half, decoding
        from nanovllm_core.testing.kernel_calls import answer, calls, defined

        for places in (PLACES, (7,), (12, 12, 12)):
            call = calls(request, (1,) * len(places))[0]
            batch = decoding(places, request.device)
            here, right = (evolve(call, args=[*call.args[:3], batch, Half(request, places)]) for _ in range(2))
            found = answer(self.load(request), here, ()).outputs[0]
            wanted = defined(request.operation, right, ()).outputs[0]
            told = f"{self.named(request, call)}: new tokens at {places}"
            self.check(bool(torch.isfinite(found).all()), f"{told}: not finite", "nothing outside a row is read")
            self.alike(request, found, wanted, told, "a token sees its own row up to itself")
