"""AdamW by the textbook in float64."""

import torch
from torch import nn

from nanovllm_core.training.optimizer import adamw


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
