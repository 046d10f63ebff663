"""Gradient checkpointing changes nothing but memory: same losses, same gradients, bit for bit, dropout too."""

import pytest
import torch
from attrs import evolve
from torch import nn

from nanovllm_core.assemble import assemble
from nanovllm_core.training.recompute import recompute_blocks


class Dropping(nn.Module):
    """A model of no kind of ours: blocks with dropout, a keyword argument, and one that gives two tensors on."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(DroppingBlock() for _ in range(3))

    @property
    def blocks(self):
        return self.layers

    def forward(self, tokens, batch, kv=None, targets=None):
        x, log = self.first(tokens), 0
        for block in self.layers:
            x, extra = block(x, scale=0.5)
            log = log + extra
        return torch.nn.functional.cross_entropy(x @ self.first.weight.t(), targets, reduction="sum") + log


class DroppingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.runs = nn.Linear(16, 16), nn.Dropout(0.3), 0

    def forward(self, x, *, scale):
        self.runs += 1
        y = self.drop(torch.tanh(self.linear(x))) * scale
        return x + y, y.square().mean()


def step(module, tokens, batch, targets):
    torch.manual_seed(3)
    loss = module(tokens, batch, targets=targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return loss.detach(), found, torch.get_rng_state()


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@pytest.mark.parametrize("lengths", [(16, 16), (31, 9, 18)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_and_gradients_of_the_native_model_are_bit_equal(plan, tiny, lengths, dtype):
    module = assemble(evolve(plan, dtype=dtype), "cpu", seed=5, training=True).module
    part = tiny.micro_batch([(torch.arange(n), torch.arange(1, n + 1)) for n in lengths])
    plain = step(module, part.tokens, part.batch, part.targets)
    recompute_blocks(module)
    assert same(plain, step(module, part.tokens, part.batch, part.targets))


def test_dropout_draws_the_same_again_and_the_random_state_moves_on_as_before():
    torch.manual_seed(0)
    module = Dropping()
    tokens, targets = torch.randint(0, 50, (2, 40))
    plain = step(module, tokens, None, targets)
    recompute_blocks(module)
    again = step(module, tokens, None, targets)
    assert same(plain, again)
    assert torch.equal(plain[2], again[2])
    assert [block.runs for block in module.layers] == [3, 3, 3]  # once before; then forward and backward


def test_evaluation_runs_each_block_once():
    torch.manual_seed(0)
    module = Dropping()
    recompute_blocks(module)
    tokens, targets = torch.randint(0, 50, (2, 40))
    with torch.inference_mode():
        module(tokens, None, targets=targets)
    assert [block.runs for block in module.layers] == [1, 1, 1]


def test_frozen_blocks_and_a_frozen_embedding_recompute_too():
    torch.manual_seed(0)
    module = Dropping()
    for parameter in (*module.first.parameters(), *module.layers[0].parameters()):
        parameter.requires_grad_(False)
    tokens, targets = torch.randint(0, 50, (2, 40))
    plain = step(module, tokens, None, targets)
    recompute_blocks(module)
    assert same(plain, step(module, tokens, None, targets))
    assert "first.weight" not in plain[1]


def test_a_whole_run_is_bit_equal(tiny):
    documents, ends = tiny.random_documents(seed=3), []
    for on in (False, True, "selective"):
        heard = tiny.Heard()
        trainer = tiny.trainer(documents, heard, gradient_checkpointing=on)
        trainer.run(lambda t: None)
        weights = [p.detach().clone() for p in trainer.model.module.parameters()]
        ends.append(([heard.steps[s]["loss"] for s in heard.steps], weights))
    for losses, weights in ends[1:]:
        assert losses == ends[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, ends[0][1], strict=True))


def test_every_second_block_from_the_first():
    torch.manual_seed(0)
    module = Dropping()
    tokens, targets = torch.randint(0, 50, (2, 40))
    plain = step(module, tokens, None, targets)
    recompute_blocks(module, every=2)
    assert same(plain, step(module, tokens, None, targets))
    assert [block.runs for block in module.layers] == [3, 2, 3]
