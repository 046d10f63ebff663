"""Models that are wrong in one way each, told by the test that is there for it; two that are right, one recurrent."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve, frozen
from torch import nn

from nanovllm_core import hookimpl
from nanovllm_core.contracts import IGNORE, Accept, Refuse
from nanovllm_core.testing import ModelContract, failures, tiny


class Module(tiny.Tiny):
    """The kit's transformer in parts that can be spoilt."""

    def forward(self, tokens, batch, kv=None, targets=None):
        if targets is not None:
            return self.loss(super().forward(tokens, batch, kv, targets), targets)
        return super().forward(tokens, batch, kv)

    def loss(self, loss, targets):
        return loss


@frozen(kw_only=True, eq=False)
class Small:
    """A small transformer."""

    module = Module

    @hookimpl
    def probe(self):
        return Accept(why="it is here")

    @hookimpl
    def tokenizer(self):
        return {"use": "bpe"}

    @hookimpl
    def shape(self, vocab_size):
        return tiny.shape()

    @hookimpl
    def build(self, shape, ops):
        with torch.device("meta"):
            return self.module(ops)

    @hookimpl
    def weight(self, shape, name, seed):
        size = dict(self.build(shape, None).named_parameters())[name].shape
        return self.random(size, sum(map(ord, name)) + seed)

    def random(self, size, seed):
        value = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1
        return value + 1 if len(size) == 1 else value

    @hookimpl
    def config(self, shape):
        return {"model_type": "small", "architectures": ["Small"], "hidden_size": shape.hidden}


def told(component):
    class Kit(ModelContract):
        vocab_size = 61
        learning_rate = 1e-2

    Kit.component = component
    return failures(Kit)


def test_a_small_transformer_is_right():
    assert told(Small()) == {}


# ---------------------------------------------------------------- outline and weights


class Refuses(Small):
    """Refuses."""

    @hookimpl
    def probe(self):
        return Refuse("not today")


class NamesNoTokenizer(Small):
    """Names a tokenizer that nobody has."""

    @hookimpl
    def tokenizer(self):
        return {"use": "unheard-of"}


class CountsWrong(Small):
    """Says one parameter too many."""

    @hookimpl
    def shape(self, vocab_size):
        return evolve(tiny.shape(), parameters=tiny.shape().parameters + 1)


class TooFewRows(Small):
    """Has no room for the vocabulary."""

    @hookimpl
    def shape(self, vocab_size):
        return evolve(tiny.shape(), vocab_size=vocab_size - 1)


class ListsTooMuch(Small):
    """Lists an operation that it does not call."""

    @hookimpl
    def shape(self, vocab_size):
        return evolve(tiny.shape(), operations=(*tiny.USED, "gelu"))


class ListsTooLittle(Small):
    """Calls an operation that it does not list."""

    @hookimpl
    def shape(self, vocab_size):
        return evolve(tiny.shape(), operations=tiny.USED[:-1])


class Allocates(Small):
    """Builds with real values."""

    @hookimpl
    def build(self, shape, ops):
        with torch.device("cpu"):
            return self.module(ops)


class OrderMatters(Small):
    """Draws weights from the global generator."""

    def random(self, size, seed):
        return torch.randn(size) * 0.1


class ForgetsTheSeed(Small):
    """Gives the same weights whatever the seed."""

    def random(self, size, seed):
        return super().random(size, len(size))


class Misshapen(Small):
    """Gives a weight of another shape."""

    def random(self, size, seed):
        return super().random(size, seed).flatten()


class NotJson(Small):
    """Has a configuration that JSON cannot hold."""

    @hookimpl
    def config(self, shape):
        return {"model_type": "small", "architectures": ["Small"], "layers": (1, 2)}


class NoArchitecture(Small):
    """Has a configuration without its class."""

    @hookimpl
    def config(self, shape):
        return {"model_type": "small"}


class Misspelt(Module):
    def __init__(self, ops):
        super().__init__(ops)
        self.roles = {**self.roles, "model.layer.*.mlp.up_proj.weight": "column"}


class TwoRoles(Module):
    def __init__(self, ops):
        super().__init__(ops)
        self.roles = {**self.roles, "model.layers.*.self_attn.*": "row"}


class LacksABlock(Module):
    @property
    def blocks(self):
        return super().blocks[:-1]


# ---------------------------------------------------------------- forward


class SpoilsTheInput(Module):
    """Changes what the blocks see."""

    def __init__(self, ops):
        super().__init__(ops)
        embedding = ops.embedding if ops else None
        self.ops = ops and evolve(ops, embedding=lambda ids, weight: self.spoilt(embedding(ids, weight)))
        for block in self.model.layers:
            block.ops = self.ops

    def forward(self, tokens, batch, kv=None, targets=None):
        self.batch = batch
        return super().forward(tokens, batch, kv, targets)


class LooksAhead(SpoilsTheInput):
    def spoilt(self, x):
        return torch.cat([x[:-1] + x[1:], x[-1:]])


class LooksAcross(SpoilsTheInput):
    """Sees the token before, also where that is another document's."""

    def spoilt(self, x):
        return x if self.batch.context else torch.cat([x[:1], x[1:] + x[:-1]])


class PositionsRunOn(SpoilsTheInput):
    def spoilt(self, x):
        return x if self.batch.context else x + torch.arange(len(x))[:, None].sin()


class Noisy(SpoilsTheInput):
    def spoilt(self, x):
        return x + 1e-3 * torch.randn_like(x)


class HalfTheGradient(SpoilsTheInput):
    """The values are right, what flows back is not."""

    def spoilt(self, x):
        return x * 0.5 + (x * 0.5).detach()


class NoGradient(SpoilsTheInput):
    """The embedding is trained as the output layer alone."""

    def spoilt(self, x):
        return x.detach()


class IgnoresSelect(Module):
    def forward(self, tokens, batch, kv=None, targets=None):
        return super().forward(tokens, evolve(batch, select=None), kv, targets)


class MeanLoss(Module):
    def loss(self, loss, targets):
        return loss / max(1, int((targets != IGNORE).sum()))


class CountsIgnored(Module):
    def forward(self, tokens, batch, kv=None, targets=None):
        return super().forward(tokens, batch, kv, targets.clamp_min(0) if targets is not None else None)


class LossInHalf(Module):
    def loss(self, loss, targets):
        return loss.bfloat16()


class Remembers(Module):
    """Training moves a statistic that evaluation uses."""

    def __init__(self, ops):
        super().__init__(ops)
        self.seen = 0

    def forward(self, tokens, batch, kv=None, targets=None):
        self.seen += self.training
        out = super().forward(tokens, batch, kv, targets)
        return out if targets is not None else out * (1 + 0.01 * self.seen)


class IgnoresTheCache(Module):
    """Decodes each token as if nothing stood before it."""

    def forward(self, tokens, batch, kv=None, targets=None):
        return super().forward(tokens, evolve(batch, context=0), None, targets)


class Untied(Module):
    """Says tied, and has an output layer of its own."""

    def __init__(self, ops):
        super().__init__(ops)
        self.lm_head = nn.Module()
        self.lm_head.weight = nn.Parameter(torch.empty(64, 32))
        if ops is not None:
            self.ops = evolve(
                ops,
                linear_cross_entropy=lambda x, w, targets: ops.linear_cross_entropy(x, self.lm_head.weight, targets),
                linear=lambda x, w, b: ops.linear(x, self.lm_head.weight, b),
            )


WRONG = {
    Refuses: "test_probe_accepts",
    NamesNoTokenizer: "test_names_a_tokenizer",
    CountsWrong: "test_parameters_are_as_many_as_the_shape_says",
    TooFewRows: "test_shape_is_sound",
    ListsTooMuch: "test_calls_the_operations_that_it_lists",
    ListsTooLittle: "test_calls_the_operations_that_it_lists",
    OrderMatters: "test_weights_depend_on_seed_and_name_alone",
    ForgetsTheSeed: "test_weights_depend_on_seed_and_name_alone",
    Misshapen: "test_weights_fit_their_parameters",
    NotJson: "test_config_is_that_of_hugging_face",
    NoArchitecture: "test_config_is_that_of_hugging_face",
    Allocates: "test_is_built_on_meta",
    Misspelt: "test_roles_are_those_of_parameters",
    TwoRoles: "test_roles_are_those_of_parameters",
    LacksABlock: "test_blocks_are_the_layers",
    LooksAhead: "test_later_tokens_change_nothing_before_them",
    LooksAcross: "test_documents_do_not_see_each_other",
    PositionsRunOn: "test_documents_packed_are_as_alone",
    Noisy: "test_logits_are_those_of_the_selected_tokens",
    HalfTheGradient: "test_gradients_are_the_slopes_of_the_loss",
    NoGradient: "test_gradients_are_exact_in_double_precision",
    IgnoresSelect: "test_logits_are_those_of_the_selected_tokens",
    MeanLoss: "test_loss_is_the_sum_of_cross_entropies",
    CountsIgnored: "test_ignored_targets_are_left_out",
    LossInHalf: "test_loss_is_the_sum_of_cross_entropies",
    Remembers: "test_training_leaves_no_trace_in_evaluation",
    IgnoresTheCache: "test_decoding_goes_on_from_a_prefill",
    Untied: "test_tied_means_one_parameter",
}
NOTHING_ELSE = {
    Refuses, NamesNoTokenizer, CountsWrong, ListsTooMuch, ListsTooLittle, NotJson, NoArchitecture, Allocates, Misspelt,
    TwoRoles, Remembers,
}  # fmt: skip


@pytest.mark.parametrize("cls", WRONG, ids=lambda c: c.__name__)
def test_models(cls):
    component = (
        cls() if issubclass(cls, Small) else type(cls.__name__, (Small,), {"module": cls, "__doc__": "Spoilt."})()
    )
    found = told(component)
    assert WRONG[cls] in found
    if cls in NOTHING_ELSE:
        assert set(found) == {WRONG[cls]}, found


# ---------------------------------------------------------------- a model that keeps its own state


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


class Recurrent(Small):
    """A recurrent model that keeps its own state."""

    module = Running

    @hookimpl
    def shape(self, vocab_size):
        return evolve(
            tiny.shape(), hidden=16, heads=0, kv_heads=0, head_dim=0, parameters=64 * 16 + 2 * 256, own_cache=True,
            operations=("embedding", "linear", "linear_cross_entropy"),
        )  # fmt: skip


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
