"""Schedules by their definition; AdamW by the textbook in float64."""

import math

import pytest
import torch
from torch import nn

from nanovllm_core.training.optimizer import adamw, rate


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_and_never_wastes_a_step(kind):
    rates = [rate(kind, step, total=50, warmup=9) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert min(rates) > 0


def test_the_decays():
    assert [rate("linear", s, total=10, warmup=0) for s in range(10)] == pytest.approx([1 - s / 10 for s in range(10)])
    assert rate("cosine", 25, total=50, warmup=0) == pytest.approx(0.5)
    assert rate("cosine", 30, total=40, warmup=20) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert {rate("constant", s, total=10, warmup=0) for s in range(10)} == {1.0}
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        rate("step", 1, total=2, warmup=0)


def test_a_warm_up_longer_than_the_run_still_rises():
    rates = [rate("cosine", s, total=5, warmup=100) for s in range(5)]
    assert rates == sorted(rates)


def test_adamw_is_the_textbook_and_spares_vectors_from_decay():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    reference = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in reference.items()}
    lr, decay, (b1, b2), eps = 0.02, 0.3, (0.9, 0.95), 1e-8
    optimizer = adamw(model.named_parameters(), learning_rate=lr, weight_decay=decay, betas=(b1, b2))
    for step in range(1, 21):
        x = torch.randn(8, 6)
        model(x).square().mean().backward()
        for name, p in model.named_parameters():
            g, w, (m, v) = p.grad.double(), reference[name], moments[name]
            w.mul_(1 - lr * (decay if w.ndim >= 2 else 0))
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            w.sub_(lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps))
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), reference[name], rtol=1e-5, atol=1e-6)
