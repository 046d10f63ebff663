"""A model's gradients are those of its loss, and a few steps along them lower it."""

from __future__ import annotations

from unittest import SkipTest

from nanovllm_core.testing.model_runs import LENGTHS, ModelTests

CHANGE = 0.03  # of the loss, that a finite difference aims at: its rounding (fp32) is some 1e-5
FINE = 1e-5  # a step in fp64
STEPS = 30


class GradientTests(ModelTests):
    gradient_tolerance: float = 0.03  # between a gradient and the slope of the loss along it

    def test_every_parameter_gets_a_gradient(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack, parameters

        module = self.filled()
        module.train(True)
        tokens = draw(15, self.vocab_size)
        backward(module(tokens, pack(*LENGTHS), targets=draw(15, self.vocab_size, seed=1)))
        for name, parameter in parameters(module).items():
            grad = parameter.grad
            self.check(grad is not None, f"{name} has no gradient", "a parameter takes part in the loss")
            if grad is not None:
                self.check(bool(torch.isfinite(grad).all()), f"{name}: not finite", "gradients are finite")
                told = f"{name} is {parameter.dtype}, its gradient {grad.dtype}"
                self.check(grad.dtype == torch.float32, told, "masters are fp32, and so are their gradients")

    def test_gradients_are_the_slopes_of_the_loss(self) -> None:
        """Each parameter is moved both ways along its gradient; the loss must change by the gradient's length."""
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack, parameters

        module, batch = self.filled(), pack(*LENGTHS)
        tokens, targets = draw(15, self.vocab_size), draw(15, self.vocab_size, seed=1)
        backward(module(tokens, batch, targets=targets))
        for name, parameter in parameters(module).items():
            if parameter.grad is None:
                continue  # the test above fails with it
            norm = float(parameter.grad.double().norm())
            most = 0.05 * float(parameter.detach().norm()) + 1e-3
            step = min(CHANGE / 2 / norm, most) if norm else most
            toward = parameter.grad / norm if norm else torch.full_like(parameter, parameter.numel() ** -0.5)
            losses = []
            with torch.no_grad():
                start = parameter.clone()
                for sign in (1, -1):
                    parameter.copy_(start + sign * step * toward)
                    losses.append(float(module(tokens, batch, targets=targets)))
                parameter.copy_(start)
            slope = (losses[0] - losses[1]) / (2 * step)
            rounding = 1e-6 * abs(losses[0]) / step
            told = f"{name}: the gradient's length is {norm:.4g}, the loss's slope along it {slope:.4g}"
            self.check(abs(slope - norm) <= self.gradient_tolerance * norm + rounding, told, "they are one")

    def test_gradients_are_exact_in_double_precision(self) -> None:
        """Along a random direction, where a part that is missing from a gradient cannot hide behind the rest."""
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack, parameters
        from nanovllm_core.testing.reference import reference_ops

        tokens, targets, batch = draw(15, self.vocab_size), draw(15, self.vocab_size, seed=1), pack(*LENGTHS)
        try:
            module = self.filled(reference_ops("float64"), dtype=torch.float64)
            loss = module(tokens, batch, targets=targets)
        except (RuntimeError, TypeError, ValueError) as e:
            raise SkipTest(f"it does not compute in fp64, which the contract does not ask for: {e}") from e
        backward(loss)
        for name, parameter in parameters(module).items():
            if parameter.grad is None:
                continue  # another test fails with it
            toward = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            toward /= toward.norm()
            slopes = []
            with torch.no_grad():
                start = parameter.clone()
                for step in (FINE, 2 * FINE):
                    ends = []
                    for sign in (1, -1):
                        parameter.copy_(start + sign * step * toward)
                        ends.append(float(module(tokens, batch, targets=targets)))
                    slopes.append((ends[0] - ends[1]) / (2 * step))
                parameter.copy_(start)
            said = float((parameter.grad * toward).sum())
            unsure = abs(slopes[0] - slopes[1]) + 1e-6 * float(
                parameter.grad.norm()
            )  # what it computes in less than fp64
            told = f"{name}: along a random direction the gradient says {said:.6g}, the loss's slope is {slopes[0]:.6g}"
            self.check(abs(said - slopes[0]) <= 1e-3 * abs(said) + 10 * unsure, told, "they are one")

    def test_computes_in_bfloat16(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack, parameters
        from nanovllm_core.testing.reference import reference_ops

        tokens, targets = draw(15, self.vocab_size), draw(15, self.vocab_size, seed=1)
        exact = float(self.filled()(tokens, pack(*LENGTHS), targets=targets).detach())
        module = self.filled(reference_ops("bfloat16"))
        loss = module(tokens, pack(*LENGTHS), targets=targets)
        found = float(loss.detach())
        told = f"the loss is {found:.4f} ({loss.dtype}) in bf16, {exact:.4f} in fp32"
        good = loss.dtype == torch.float32 and abs(found - exact) <= 0.05 * exact
        self.check(good, told, "fp32 masters, bf16 compute, a loss in fp32 that is close")
        backward(loss)
        wrong = [n for n, p in parameters(module).items() if p.grad is not None and p.grad.dtype != torch.float32]
        self.check(not wrong, f"gradients of {wrong[:3]} are not fp32", "masters keep their dtype")

    def test_learns_a_line_by_heart(self) -> None:
        import torch

        from nanovllm_core.testing.modelling import backward, draw, pack
        from nanovllm_core.training.optimizer import adamw

        module = self.filled(spread=0.0)
        module.train(True)
        tokens = draw(16, self.vocab_size)
        targets = torch.cat([tokens[1:], tokens[:1]])
        optimizer = adamw(
            module.named_parameters(), learning_rate=self.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        losses = []
        for _ in range(STEPS):
            loss = module(tokens, pack(16), targets=targets) / 16
            backward(loss)
            optimizer.update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        told = f"{STEPS} steps took the loss from {losses[0]:.3f} to {losses[-1]:.3f}"
        self.check(losses[-1] < 0.8 * losses[0], told, "steps along the gradient lower the loss by a fifth at least")
