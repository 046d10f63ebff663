"""AdamW: by the textbook in float64, and beside torch's own."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from nanovllm_core.training.optimizer import adamw, decayed, rounded_


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


def test_rounding_to_bf16_keeps_the_mean():
    torch.manual_seed(2)
    exact, random = torch.randn(500) * 10 ** torch.empty(500).uniform_(-6, 6), torch.Generator().manual_seed(3)
    below = (exact.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    gap = (below.view(torch.int32) + 65536).view(torch.float32) - below
    draws = torch.stack([rounded_(exact.clone(), random) for _ in range(2000)]).float()
    assert bool(((draws == below) | (draws == below + gap)).all())
    share = ((draws.double() - below) / gap).mean(0)  # of the draws that went away from zero
    assert (share - (exact.double() - below) / gap).abs().max() < 5 * 0.5 / 2000**0.5
    special = torch.tensor([0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan])
    assert rounded_(special.clone(), random).tolist()[:5] == special.tolist()[:5]
    assert rounded_(special.clone(), random)[5].isnan()


def test_bf16_weights_move_in_the_mean_as_fp32_ones():
    """By steps a hundredth of what bf16 tells apart there."""
    torch.manual_seed(4)
    exact = nn.ParameterDict({"w": nn.Parameter(torch.ones(40, 50)), "b": nn.Parameter(torch.ones(50))})
    coarse = copy.deepcopy(exact).to(torch.bfloat16)
    models = [
        (m, adamw(m.named_parameters(), learning_rate=4e-5, weight_decay=0.1, betas=(0.9, 0.95)))
        for m in (exact, coarse)
    ]
    for step in range(200):
        gradients = {name: torch.randn_like(p) + 0.5 for name, p in exact.items()}
        for model, optimizer in models:
            for name, p in model.items():
                p.grad = gradients[name].to(p.dtype, copy=True)
            optimizer.update(torch.tensor(2.0), torch.tensor(0.0), seed=step)
    moved, wanted = ((1 - m["w"].detach().double()).mean() for m in (coarse, exact))
    assert wanted > 0.002
    assert abs(moved - wanted) < 0.05 * wanted
    assert all(x.dtype == torch.bfloat16 for s in models[1][1].state.values() for k, x in s.items() if k != "step")
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = (o.state[m["w"]][key].double().mean() for m, o in models)
        assert abs(a - b) < 0.02 * abs(a)


def test_a_step_of_bf16_weights_follows_from_its_seed_and_may_be_skipped():
    first = nn.Parameter(torch.randn(64, 64).bfloat16())
    gradient = torch.randn(64, 64).bfloat16()

    def stepped(skip, seed):
        p = nn.Parameter(first.detach().clone())
        p.grad = gradient.clone()
        optimizer = adamw([("w", p)], learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        optimizer.update(None, skip, seed=seed)
        return p.detach(), optimizer.state[p]

    (plain, kept), (again, _), (other, _) = stepped(None, 1), stepped(torch.tensor(0.0), 1), stepped(None, 2)
    assert torch.equal(plain, again)
    assert not torch.equal(plain, other)
    assert float(kept["step"]) == 1
    skipped, none = stepped(torch.tensor(1.0), 1)
    assert torch.equal(skipped, first)
    assert not any(bool(x.any()) for x in none.values())


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
