"""The loss: a sum in fp32 over the targets that are trained."""

from __future__ import annotations

from attrs import evolve

from nanovllm_core.contracts import IGNORE
from nanovllm_core.testing.kernel_cases import KernelTests


class LossTests(KernelTests):
    def test_ignored_targets_are_left_out(self) -> None:
        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests("linear_cross_entropy"):
            for every in (2, 3, 15):
                call = calls(request, (15,))[0]
                call.args[2][::every] = IGNORE
                rule = "ignored targets add nothing to the sum, and no gradient"
                self.same(request, call, rule)
                gradient = answer(self.load(request), call, (0,)).gradients[0]
                kept = gradient is not None and bool((gradient[::every] != 0).any())
                self.check(not kept, f"{self.named(request, call)}: rows of ignored targets have a gradient", rule)

    def test_no_target_is_trained(self) -> None:
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests("linear_cross_entropy"):
            call = calls(request, (15,))[0]
            call.args[2] = torch.full_like(call.args[2], IGNORE)
            found = answer(self.load(request), call, (0, 1))
            for i, x in enumerate([*found.outputs, *found.gradients]):
                good = x is not None and bool((x == 0).all())
                told = f"{self.named(request, call)}: no target is trained and result {i} is not 0"
                self.check(good, told, "loss and gradients are 0")

    def test_confident_logits(self) -> None:
        """Logits in the hundreds: the sum of exponentials overflows where it is not shifted.

        Where logits are rounded to bf16 their loss is still close, their probabilities are not: it is compared alone.
        """
        from nanovllm_core.testing.kernel_calls import calls

        for accepted in self.requests("linear_cross_entropy"):
            request = evolve(accepted, training=accepted.dtype == "float32")
            for call in calls(request, (15,), scale=200.0):
                self.same(request, call, "the largest logit is subtracted before exponentials are taken", by=10)
