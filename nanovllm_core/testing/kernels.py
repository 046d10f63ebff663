"""Kernels: every operation that is accepted gives what its definition gives, and touches nothing else."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from nanovllm_core.contracts import GENERATION, KernelRequest, Refuse
from nanovllm_core.hookspecs import Kernels
from nanovllm_core.testing.kernel_attention import AttentionTests
from nanovllm_core.testing.kernel_cases import LENGTHS, SHAPES
from nanovllm_core.testing.kernel_loss import LossTests
from nanovllm_core.testing.kernel_sampling import SamplingTests

SUMMED = ("embedding", "linear", "rms_norm", "layer_norm", "linear_cross_entropy")  # over tokens, for their weights
MANY = 600  # terms of a sum: bf16 stops counting ones at 256


class KernelContract(AttentionTests, LossTests, SamplingTests):
    """A component of kernels.

    operations: those that it implements; none: whatever its probe accepts
    devices: those that it is tried on; none: whatever its probe accepts on this machine
    shapes: the models that it is tried for; those that its probe refuses are left out
    tolerances: compute dtype -> difference allowed, as a share of the largest value
    """

    # ------------------------------------------------------------ probe and load

    def test_accepts_its_operations(self) -> None:
        accepted = {request.operation for training in (True, False) for request in self.requests(training=training)}
        missing = sorted(set(self.operations) - accepted)
        self.check(not missing, f"probe refuses {', '.join(missing)} for every shape", "it takes what it implements")
        self.check(bool(accepted), "probe refuses every request", "it implements an operation, or why is it here")

    def test_refuses_what_it_cannot(self) -> None:
        probe = self.bound(Kernels).probe
        request = KernelRequest(operation="linear", device="cpu", dtype="float32", shape=SHAPES[0])
        for strange in (
            evolve(request, operation="unheard_of"),
            evolve(request, device="abacus"),
            evolve(request, dtype="float7"),
        ):
            answer = self.verdict(str(strange), probe, request=strange)
            self.check(isinstance(answer, Refuse), f"{strange}: {answer}", "what it does not know it refuses")

    def test_loads_a_callable(self) -> None:
        for request in self.requests():
            self.check(callable(self.load(request)), f"{request} loaded no callable", "load gives the implementation")

    # ------------------------------------------------------------ values

    def test_outputs_are_those_of_the_definition(self) -> None:
        """For generation: weights in the compute dtype, no gradients."""
        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests(training=False):
            for lengths in LENGTHS if request.operation not in GENERATION else ():  # those have tests of their own
                for call in calls(request, lengths):
                    self.same(request, call, "outputs are those of the definition")
                    (output, *_) = answer(self.load(request), call, ()).outputs
                    wanted = (
                        "torch.float32" if request.operation == "linear_cross_entropy" else f"torch.{request.dtype}"
                    )
                    told = f"{self.named(request, call)}: the output is {output.dtype}"
                    self.check(str(output.dtype) == wanted, told, f"it is {wanted}")

    def test_gradients_are_those_of_the_definition(self) -> None:
        """For training: weights are fp32 masters, or of the compute dtype; every input, all together and each alone."""
        from nanovllm_core.testing.kernel_calls import calls

        for request in self.requests():
            for lengths in LENGTHS:
                for call in calls(request, lengths):
                    self.same(request, call, "gradients are those of the definition", one_by_one=True)
            if request.dtype != "float32":
                for call in calls(request, LENGTHS[0], masters=False):
                    self.same(request, call, "gradients are those of the definition, of bf16 weights too")

    def test_weight_gradients_add_up_over_many_tokens(self) -> None:
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls, defined

        for request in self.requests():
            if request.operation not in SUMMED:
                continue
            call = calls(request, (MANY,))[0]
            if request.operation == "embedding":
                call.args[0] = torch.full_like(call.args[0], 5)
            else:
                call.args[0] = (call.args[0].float().abs() * 0.25 + 1).to(call.args[0].dtype)
            if request.operation == "linear_cross_entropy":
                call.args[2] = torch.full_like(call.args[2], 5)
            outputs = answer(self.load(request), call, ()).outputs
            ones = [torch.ones_like(o) for o in outputs]
            found, right = answer(self.load(request), call, (1,), ones), defined(request.operation, call, (1,), ones)
            told = f"{self.named(request, call)}: the weight's gradient"
            rule = f"{MANY} tokens of one sign add up: sums are kept in fp32"
            self.alike(request, found.gradients[0], right.gradients[0], told, rule)

    def test_large_values(self) -> None:
        """Activations of 10,000: no overflow, on the way forward or back."""
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests():
            for call in calls(request, (5, 1, 9), scale=1e4):
                found = answer(self.load(request), call, call.leaves)
                for i, x in enumerate([*found.outputs, *found.gradients]):
                    told = f"{self.named(request, call)}, values of 1e4: result {i} is not finite"
                    self.check(x is not None and bool(torch.isfinite(x).all()), told, "finite inputs, finite results")

    def test_one_token_and_none(self) -> None:
        from nanovllm_core.testing.kernel_calls import calls

        for request in self.requests():
            for lengths in ((1,), ()):
                for call in calls(request, lengths):
                    self.same(request, call, "a batch may have one token, or none")

    # ------------------------------------------------------------ memory

    def test_reads_nothing_beyond_its_inputs(self) -> None:
        """Inputs lie between NaN: what reads too far shows it in its results, what writes too far in the margins."""
        self.placed("guarded", "nothing outside of an input is read or written")

    def test_takes_strided_inputs(self) -> None:
        """Activations may be parts of wider rows (the rest is NaN) or transposed; so may the gradients that come in."""
        self.placed("strided", "inputs need not be contiguous")
        self.placed("transposed", "inputs need not be contiguous")

    def test_leaves_its_inputs_as_they_are(self) -> None:
        import torch

        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests():
            for call in calls(request, (5, 1, 9)):
                before = [a.clone() if isinstance(a, torch.Tensor) else a for a in call.args]
                outputs = answer(self.load(request), call, ()).outputs
                cotangents = [torch.ones_like(o) for o in outputs]
                answer(self.load(request), call, call.leaves, cotangents)
                for i, (old, new) in enumerate(zip(before, call.args, strict=True)):
                    if isinstance(old, torch.Tensor):
                        told = f"{self.named(request, call)}: argument {i} was changed"
                        self.check(torch.equal(old, new), told, "inputs are not written to")
                changed = any(not bool((c == 1).all()) for c in cotangents)
                self.check(
                    not changed, f"{self.named(request, call)}: the gradient that came in was changed", "likewise"
                )

    def test_writes_all_of_its_results(self) -> None:
        """New memory is made to hold NaN, and stays so where nothing is written."""
        from nanovllm_core.testing.kernel_calls import calls, poisoned

        for request in self.requests():
            for call in calls(request, (5, 1, 9)):
                with poisoned():
                    self.same(request, call, "every value of a result is written")

    def test_is_the_same_again(self) -> None:
        """No state is left behind: a call after calls of other sizes gives what it gave before."""
        from nanovllm_core.testing.kernel_calls import answer, calls

        for request in self.requests():
            function, call = self.load(request), calls(request, (5, 1, 9))[0]
            first = answer(function, call, call.leaves)
            for lengths in ((130, 3), (1,)):
                answer(function, calls(request, lengths, seed=1)[0], call.leaves)
            again = answer(function, call, call.leaves)
            for a, b in zip([*first.outputs, *first.gradients], [*again.outputs, *again.gradients], strict=True):
                self.alike(request, a, b, self.named(request, call), "a result depends on the inputs alone")

    def placed(self, how: str, rule: str) -> None:
        """Call with inputs that stand so in memory."""
        import torch

        from nanovllm_core.testing import kernel_calls as k

        place: Any = getattr(k, how)
        for request in self.requests():
            function = self.load(request)
            for call in k.calls(request, (5, 1, 9)):
                chosen = range(len(call.args)) if how == "guarded" else call.activations
                held = {i: place(call.args[i]) for i in chosen if isinstance(call.args[i], torch.Tensor)}
                args = [held[i].tensor if i in held else a for i, a in enumerate(call.args)]
                right = k.defined(request.operation, call, call.leaves)
                cotangents = [place(c).tensor if c.ndim else c for c in k.likewise(right.outputs)]
                found = k.answer(function, evolve(call, args=args), call.leaves, cotangents)
                told = f"{self.named(request, call)}, {how}"
                for i, (a, b) in enumerate(
                    zip([*found.outputs, *found.gradients], [*right.outputs, *right.gradients], strict=True)
                ):
                    self.alike(request, a, b, f"{told}: result {i}", rule)
                over = [i for i, p in held.items() if p.touched()]
                self.check(not over, f"{told}: memory of or around the arguments {over} was written", rule)
