"""AdamW: by the textbook in float64, and beside torch's own."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanovllm_core.training.optimizer import adamw, decayed


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
        optimizer.update()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_it_is_torchs_to_the_bit(skip):
    """With gradients that are divided as they are read, steps that are skipped, and a parameter that has none at first."""
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    theirs = copy.deepcopy(ours)
    mine = adamw(ours.named_parameters(), learning_rate=0.02, weight_decay=0.3, betas=(0.9, 0.95))
    right = torch.optim.AdamW(decayed(theirs.named_parameters(), 0.3), lr=0.02, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(6):
        x, divisor = torch.randn(8, 6), torch.rand(()) + 0.5
        for model in (ours, theirs):
            y = model[0](x) if step < 3 else model(x)
            y.square().mean().backward()
        mine.update(divisor, None if skip is None else torch.tensor(skip))
        right.grad_scale, right.found_inf = divisor, None if skip is None else torch.tensor(skip)
        right.step()
        for model, optimizer in ((ours, mine), (theirs, right)):
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert mine.state[a].keys() == right.state[b].keys()
        assert all(torch.equal(mine.state[a][key], right.state[b][key]) for key in mine.state[a])
        assert float(mine.state[a]["step"]) == (0 if skip == 1 else 6 if name.startswith("0.") else 3)


def test_a_run_imports_no_compiler():
    """Nor DTensors, where there is one rank: they take longer to import than a small run to train."""
    code = (
        "import sys, torch; from nanovllm_core.training.optimizer import adamw; m = torch.nn.Linear(2, 2)\n"
        "o = adamw(m.named_parameters(), learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))\n"
        "m(torch.ones(1, 2)).sum().backward(); o.update(); o.zero_grad()\n"
        "print(*{'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n"
