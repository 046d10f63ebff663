"""What a model's forward pass must keep: documents apart, time in order, the loss a sum of logarithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm_core.contracts import GENERATION, IGNORE, OPERATIONS, Module, Ops, Shape
from nanovllm_core.hookspecs import Models
from nanovllm_core.testing.contract import Contract

LENGTHS = (5, 1, 9)  # of the documents in a batch


class ModelTests(Contract):
    """What all tests of a model share."""

    kind = "models"
    vocab_size: int = 97
    tolerance: float = 1e-4
    learning_rate: float = 3e-3

    def shaped(self) -> Shape:
        return self.bound(Models).shape(vocab_size=self.vocab_size)

    def meta(self) -> Module:
        """The module as `build` makes it."""
        from nanovllm_core.testing.reference import reference_ops

        return self.bound(Models).build(shape=self.shaped(), ops=reference_ops())

    def filled(self, ops: Ops | None = None, **more: Any) -> Module:
        """The module with weights, in evaluation."""
        from nanovllm_core.testing.modelling import build

        return build(self.bound(Models), self.shaped(), ops, **more)

    def close(self, found: Any, wanted: Any, given: str, rule: str) -> None:
        from nanovllm_core.testing.modelling import far

        if found.shape != wanted.shape:
            self.check(False, f"{given}: shape {list(found.shape)}, expected {list(wanted.shape)}", rule)
        off = far(found, wanted)
        self.check(off <= self.tolerance, f"{given}: differ by {off:.1e} (allowed {self.tolerance:.0e})", rule)


class ForwardTests(ModelTests):
    def test_calls_the_operations_that_it_lists(self) -> None:
        from nanovllm_core.testing.modelling import Kept, draw, logits, pack
        from nanovllm_core.testing.reference import reference_ops

        met: set[str] = set()
        plain, shape = reference_ops(), self.shaped()
        noted: dict[str, Any] = {n: _noting(n, getattr(plain, n), met) for n in (*OPERATIONS, *GENERATION)}
        module = self.filled(Ops(dtype="float32", **noted))
        tokens = draw(15, self.vocab_size)
        module(tokens, pack(*LENGTHS), targets=tokens)
        logits(module, tokens, pack(*LENGTHS))
        if "cache" not in shape.limits:
            rows = Kept.of(module, shape, [tokens[:6]], [5])
            rows.read(0, 1)
            rows.decode()
        met = {GENERATION.get(name, name) for name in met}
        self.check(
            met == set(shape.operations), f"calls {sorted(met)}, lists {sorted(shape.operations)}", "both are one"
        )

    def test_logits_are_those_of_the_selected_tokens(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import draw, logits, pack

        module, shape, tokens = self.filled(), self.shaped(), draw(15, self.vocab_size)
        whole, again = (logits(module, tokens, pack(*LENGTHS)) for _ in range(2))
        size = (15, shape.vocab_size)
        self.check(tuple(whole.shape) == size, f"logits {list(whole.shape)}", f"without `select`: {list(size)}")
        self.check(bool(torch.isfinite(whole).all()), "logits are not finite", "logits are finite")
        self.check(torch.equal(whole, again), "the same batch gave other logits", "evaluation is deterministic")
        select = torch.tensor([14, 0, 4, 5, 5])
        chosen = logits(module, tokens, pack(*LENGTHS, select=select))
        self.close(chosen, whole[select], f"select {select.tolist()}", "the logits of those tokens, in that order")

    def test_later_tokens_change_nothing_before_them(self) -> None:
        from nanovllm_core.testing.modelling import draw, logits, pack

        module, tokens = self.filled(), draw(15, self.vocab_size)
        before = logits(module, tokens, pack(15))
        for at in (1, 7, 14):
            changed = tokens.clone()
            changed[at:] = (changed[at:] + 1) % self.vocab_size
            after = logits(module, changed, pack(15))
            wrong = (before[:at] != after[:at]).any(-1).nonzero().flatten().tolist()
            told = f"tokens from {at} on were changed, and so were the logits at {wrong}"
            self.check(not wrong, told, "no bit of an earlier token's logits depends on a later token")
            self.check(bool((before[at] != after[at]).any()), f"token {at} changed nothing", "a token is looked at")

    def test_documents_do_not_see_each_other(self) -> None:
        from nanovllm_core.testing.modelling import draw, logits, pack

        module, tokens = self.filled(), draw(15, self.vocab_size)
        before, first = logits(module, tokens, pack(*LENGTHS)), 0
        for length in LENGTHS:
            changed, last = tokens.clone(), first + length
            changed[first:last] = (changed[first:last] + 1) % self.vocab_size
            differs = (before != logits(module, changed, pack(*LENGTHS))).any(-1)
            differs[first:last] = False
            wrong, told = differs.nonzero().flatten().tolist(), f"tokens {first} to {last - 1} of documents {LENGTHS}"
            self.check(not wrong, f"{told} changed the logits at {wrong}", "no bit crosses a document's border")
            first = last

    def test_documents_packed_are_as_alone(self) -> None:
        """So positions, too, begin anew with each document."""
        import torch

        from nanovllm_core.testing.modelling import draw, logits, pack

        module, tokens = self.filled(), draw(15, self.vocab_size)
        parts = torch.split(tokens, list(LENGTHS))
        alone = torch.cat([logits(module, part, pack(len(part))) for part in parts])
        packed = logits(module, tokens, pack(*LENGTHS))
        self.close(packed, alone, f"documents {LENGTHS} packed and alone", "packing changes no result")
        one = logits(module, parts[2], pack(9))
        twice = logits(module, torch.cat([parts[2]] * 2), pack(9, 9))
        self.close(twice, torch.cat([one, one]), "one document twice in a batch", "both copies get the same logits")

    def test_loss_is_the_sum_of_cross_entropies(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import draw, logits, pack

        module, tokens, targets = self.filled(), draw(15, self.vocab_size), draw(15, self.vocab_size, seed=1)
        found = module(tokens, pack(*LENGTHS), targets=targets).detach()
        kind = f"a loss of shape {list(found.shape)}, {found.dtype}"
        self.check(found.shape == () and found.dtype == torch.float32, kind, "a scalar in fp32")
        log_probs = torch.log_softmax(logits(module, tokens, pack(*LENGTHS)).double(), -1)
        wanted = -log_probs.gather(1, targets[:, None]).sum()
        self.close(found, wanted, f"loss {float(found):.5f}, of its logits {float(wanted):.5f}", "the sum")

    def test_ignored_targets_are_left_out(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack, parameters

        module, tokens, targets = self.filled(), draw(15, self.vocab_size), draw(15, self.vocab_size, seed=1)
        batch, some = pack(*LENGTHS), torch.arange(15) % 3 == 0
        parts = [module(tokens, batch, targets=targets.masked_fill(m, IGNORE)).detach() for m in (some, ~some)]
        whole = module(tokens, batch, targets=targets).detach()
        self.close(
            parts[0] + parts[1], whole, "a third of the targets, and the rest", "together they are the whole loss"
        )
        loss = module(tokens, batch, targets=torch.full((15,), IGNORE))
        self.check(not bool(loss), f"no target is trained, the loss is {loss.item()}", "it is 0")
        if loss.requires_grad:
            backward(loss)
            held = [n for n, p in parameters(module).items() if p.grad is not None and not bool((p.grad == 0).all())]
            self.check(not held, f"no target is trained, {held[:3]} have gradients", "they are 0")

    def test_training_leaves_no_trace_in_evaluation(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import backward, draw, logits, pack

        module, tokens = self.filled(), draw(15, self.vocab_size)
        before = logits(module, tokens, pack(*LENGTHS))
        module.train(True)
        backward(module(tokens, pack(*LENGTHS), targets=tokens))
        module.train(False)
        after = logits(module, tokens, pack(*LENGTHS))
        self.check(torch.equal(before, after), "a forward and backward changed later logits", "only a step may")


def _noting(name: str, call: Callable[..., Any], met: set[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        met.add(name)
        return call(*args, **kwargs)

    return noted
