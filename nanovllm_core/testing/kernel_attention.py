"""Attention: documents apart to the bit, nothing seen before its time, windows, and sequences in pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from nanovllm_core.testing.kernel_cases import KernelTests

if TYPE_CHECKING:
    from nanovllm_core.contracts import KernelRequest

PACKED = (5, 1, 9, 33)
WINDOWS = (1, 5, 64)


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

    def test_decodes_over_pages(self) -> None:
        """What a sequence's pages hold beyond it is large and finite, what is in nobody's pages is NaN."""
        for request in self.requests("paged_attention", training=False):
            self.decode(request)

    def test_decodes_within_a_window(self) -> None:
        for window in WINDOWS:
            for request in self.requests("paged_attention", training=False, window=window):
                self.decode(request)

    def decode(self, request: KernelRequest) -> None:
        import torch

        from nanovllm_core.contracts import KV
        from nanovllm_core.testing.kernel_caches import CASES, paged_call, recorded
        from nanovllm_core.testing.kernel_calls import answer, bits, defined

        more = {} if request.shape.window is None else {"window": request.shape.window}
        for case in CASES:
            call, kv = paged_call(request, case)
            theirs, right = (KV(kv.k_PSKH.clone(), kv.v_PSKH.clone()) for _ in range(2))
            defining = evolve(call, args=[*call.args, right], kwargs=more)
            wanted = defined(request.operation, defining, ()).outputs[0]
            if set(case.new) == {1} and getattr(self.load(request), "recordable", False):
                again, pages = recorded(call), KV(kv.k_PSKH.clone(), kv.v_PSKH.clone())
                found = answer(self.load(request), evolve(again, args=[*again.args, pages], kwargs=more), ()).outputs[0]
                rule = "`exact` False: contexts on the host are bounds, those on the device count"
                self.alike(request, found, wanted, self.named(request, again), rule)
            found = answer(self.load(request), evolve(call, args=[*call.args, theirs], kwargs=more), ()).outputs[0]
            told = self.named(request, call)
            self.check(bool(torch.isfinite(found).all()), f"{told}: not finite", "nothing outside a sequence is read")
            self.alike(request, found, wanted, told, "a token sees its own sequence up to itself")
            for name, a, b in (("keys", theirs.k_PSKH, right.k_PSKH), ("values", theirs.v_PSKH, right.v_PSKH)):
                same = torch.equal(bits(a), bits(b))
                self.check(
                    same,
                    f"{told}: the pages hold other {name}",
                    "new ones go to their places, and nothing else changes",
                )
