"""A model that keeps its own state: right, and wrong in what it keeps."""

from __future__ import annotations

import pytest
import torch
from attrs import frozen
from torch import nn

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Shape
from nanovllm_core.testing import ModelContract, failures


class Decay(nn.Module):
    """A block: y = x + W s, where s is the running sum of a document's x, halved at each step."""

    def __init__(self, ops):
        super().__init__()
        self.ops = ops
        self.mix = nn.Module()
        self.mix.weight = nn.Parameter(torch.empty(16, 16))

    def forward(self, x_TC, batch, state):
        if batch.context:
            rows = len(batch.lengths)
            state.sums[:rows] = state.sums[:rows] / 2 + x_TC
            sums = state.sums[:rows].clone()
        else:
            parts = []
            for document in torch.split(x_TC, list(batch.lengths)):
                s = torch.zeros(16)
                for x in document:
                    s = s / 2 + x
                    parts.append(s)
            sums = torch.stack(parts)
            if state is not None:
                state.write(batch, sums)
        return x_TC + self.ops.linear(sums.to(x_TC.dtype), self.mix.weight, None)


class State:
    def __init__(self, rows):
        self.sums = torch.zeros(rows, 16)

    def write(self, batch, sums):
        ends = batch.cu_seqlens[1:].long() - 1
        self.sums[batch.slots[ends]] = sums[ends].float()

    def move(self, source, target):
        self.sums[target] = self.sums[source]


class Running(nn.Module):
    state = State

    def __init__(self, ops):
        super().__init__()
        self.ops, self.roles = ops, {}
        self.embed = nn.Module()
        self.embed.weight = nn.Parameter(torch.empty(64, 16))
        self.layers = nn.ModuleList([Decay(ops), Decay(ops)])
        self.blocks = self.layers

    def new_cache(self, rows, device):
        return [self.state(rows) for _ in self.layers]

    def forward(self, tokens, batch, kv=None, targets=None):
        x = self.ops.embedding(tokens, self.embed.weight)
        for i, block in enumerate(self.layers):
            x = block(x, batch, None if kv is None else kv[i])
        if targets is not None:
            return self.ops.linear_cross_entropy(x, self.embed.weight, targets)
        return self.ops.linear(x if batch.select is None else x[batch.select], self.embed.weight, None)


@frozen(kw_only=True, eq=False)
class Recurrent:
    """A recurrent model that keeps its own state."""

    module = Running

    @hookimpl
    def probe(self):
        return Accept(why="it is here")

    @hookimpl
    def tokenizer(self):
        return {"use": "bpe"}

    @hookimpl
    def shape(self, vocab_size):
        return Shape(
            family="decay", vocab_size=64, layers=2, hidden=16, tied=True, max_positions=64, own_cache=True,
            parameters=64 * 16 + 2 * 256, operations=("embedding", "linear", "linear_cross_entropy"),
        )  # fmt: skip

    @hookimpl
    def build(self, shape, ops):
        with torch.device("meta"):
            return self.module(ops)

    @hookimpl
    def weight(self, shape, name, seed):
        size = (64, 16) if name == "embed.weight" else (16, 16)
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(map(ord, name)) + seed)) * 0.1

    @hookimpl
    def config(self, shape):
        return {"model_type": "decay", "architectures": ["Decay"], "hidden_size": shape.hidden}


def told(component):
    class Kit(ModelContract):
        vocab_size = 61
        learning_rate = 1e-2

    Kit.component = component
    return failures(Kit)


class StaysInItsRow(State):
    def move(self, source, target):
        pass


class WritesTheFirstToken(State):
    def write(self, batch, sums):
        self.sums[batch.slots[batch.cu_seqlens[:-1].long()]] = sums[batch.cu_seqlens[:-1].long()].float()


class IgnoresSlots(State):
    def write(self, batch, sums):
        self.sums[: len(batch.lengths)] = sums[batch.cu_seqlens[1:].long() - 1].float()


def spoilt(state):
    return type(
        "Spoilt", (Recurrent,), {"module": type("Module", (Running,), {"state": state}), "__doc__": "Spoilt."}
    )()


def test_a_recurrent_model_is_right():
    assert told(Recurrent()) == {}


def test_a_row_that_is_not_moved():
    assert set(told(spoilt(StaysInItsRow))) == {"test_rows_move_when_a_sequence_is_over"}


@pytest.mark.parametrize("state", [WritesTheFirstToken, IgnoresSlots])
def test_a_state_that_is_not_that_of_the_last_token(state):
    both = {"test_decoding_goes_on_from_a_prefill", "test_rows_move_when_a_sequence_is_over"}
    assert set(told(spoilt(state))) == both
