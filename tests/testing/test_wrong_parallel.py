"""Strategies that are wrong, each told by the test that is there for it; and one that is right on two processes.

The processes of a world import this file, so everything stands at its top level.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from attrs import frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Layout
from nanovllm_core.testing import ParallelContract, failures


class Replicas:
    """All parameters on every rank; gradients are added up after the last micro-batch."""

    def __init__(self, module, size, rank):
        self.module, self.data_size, self.data_rank = module, size, rank

    def ready(self):
        pass

    def __call__(self, tokens, batch, targets):
        return self.module(tokens, batch, targets=targets)

    @contextmanager
    def micro_batch(self, last):
        yield
        if last:
            self.reduce()

    def reduce(self):
        for _, p in self.module.named_parameters():
            p.grad = self.summed(p.grad)

    def total(self, value):
        return self.summed(value)

    def summed(self, value):
        import torch.distributed as dist

        value = value.clone()
        if self.data_size > 1:
            dist.all_reduce(value)
        return value

    def gradients(self):
        return [p.grad for _, p in self.module.named_parameters()]

    def clip(self, max_norm):
        import torch

        norm = torch.nn.utils.get_total_norm(self.gradients())
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_((p for _, p in self.module.named_parameters()), max_norm, norm)
        return norm


@frozen(kw_only=True, eq=False)
class Replicated:
    """Every rank holds the whole model."""

    @hookimpl
    def probe(self, request):
        return Accept(why="data parallel", layout=Layout(data=request.world_size))

    @hookimpl
    def parallelize(self, module, layout, mesh):
        return self.wrap(module, layout.data, mesh.get_rank() if mesh is not None else 0)

    def wrap(self, module, size, rank):
        return Replicas(module, size, rank)


class OnTwo(ParallelContract):
    worlds = (1, 2)
    component = Replicated()


def test_a_right_strategy_passes_on_two_processes():
    assert failures(OnTwo) == {}


def wrong(replicas):
    """A strategy of such replicas."""

    @frozen(kw_only=True, eq=False)
    class Strategy(Replicated):
        """Wrong."""

        def wrap(self, module, size, rank):
            return replicas(module, size, rank)

    return Strategy()


class Mean(Replicas):
    def reduce(self):
        super().reduce()
        for g in self.gradients():
            g.div_(self.data_size)


class ClipAlone(Replicas):
    """Adds up clipped gradients where clipped gradients were to be added up."""

    def reduce(self):
        pass

    def clip(self, max_norm):
        norm = super().clip(max_norm)
        super().reduce()
        return norm


class MeanOnTwo(ParallelContract):
    worlds = (2,)
    component = wrong(Mean)


class ClipAloneOnTwo(ParallelContract):
    worlds = (2,)
    component = wrong(ClipAlone)


class DiesOnOne(Replicas):
    def reduce(self):
        if self.data_rank:
            raise SystemExit("rank 1 is gone")
        super().reduce()


class DiesOnTwo(ParallelContract):
    worlds = (2,)
    component = wrong(DiesOnOne)


def test_the_mean_for_the_sum():
    found = failures(MeanOnTwo)
    assert {"test_gradients_are_summed_over_data_ranks", "test_one_micro_batch_is_enough"} <= set(found)
    assert not {"test_loss_is_that_of_one_rank", "test_full_state_is_whole", "test_tied_weights_stay_one"} & set(found)


def test_clipping_each_rank_by_itself():
    found = failures(ClipAloneOnTwo)
    assert set(found) == {"test_clip_measures_the_whole_gradient", "test_clip_scales_to_the_norm_asked_for"}


def test_a_rank_that_dies_ends_the_others():
    found = failures(DiesOnTwo)
    assert "rank 1 is gone" in found["test_loss_is_that_of_one_rank"]
    assert "test_layouts_fill_the_world" not in found


# ---------------------------------------------------------------- seen on one rank


class LastAlone(Replicas):
    """Forgets what was accumulated before the last micro-batch."""

    @contextmanager
    def micro_batch(self, last):
        if last:
            for _, p in self.module.named_parameters():
                p.grad = None
        yield


class ScalesTwice(Replicas):
    def clip(self, max_norm):
        norm = super().clip(max_norm)
        if 0 < max_norm < norm:
            super().clip(max_norm / 2)
        return norm


class ClipsAtZero(Replicas):
    """Takes 0 for a norm, not for never."""

    def clip(self, max_norm):
        norm = super().clip(max_norm)
        if max_norm == 0:
            for g in self.gradients():
                g.zero_()
        return norm


class NormAfter(Replicas):
    def clip(self, max_norm):
        norm = super().clip(max_norm)
        return norm.clamp(max=max_norm) if max_norm else norm


class LeavesOut(Replicas):
    """The last parameter is none any more."""

    def ready(self):
        norm = self.module.model.norm
        weight = norm._parameters.pop("weight")
        norm.weight = weight.detach()


class Renames(Replicas):
    """Its wrapper puts a word before every name."""

    def ready(self):
        import torch

        class Wrapper(torch.nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        self.module = Wrapper(self.module)


class Forgets(Replicas):
    """An evaluation leaves its traces in the weights."""

    def __call__(self, tokens, batch, targets):
        import torch

        loss = super().__call__(tokens, batch, targets)
        if not torch.is_grad_enabled():
            self.module.model.norm.weight.mul_(2)
        return loss


class Doubles(Replicas):
    def total(self, value):
        return value * 2


class Unties(Replicas):
    """Gives the output layer a weight of its own at the first micro-batch."""

    @contextmanager
    def micro_batch(self, last):
        import torch

        module = self.module
        if not hasattr(module, "head"):
            object.__setattr__(module, "head", torch.nn.Parameter(module.model.embed_tokens.weight.detach().clone()))
            loss = module.ops.linear_cross_entropy
            ops = type(module.ops)(
                **{a: getattr(module.ops, a) for a in module.ops.__slots__ if not a.startswith("__")}
            )
            object.__setattr__(ops, "linear_cross_entropy", lambda x, weight, targets: loss(x, module.head, targets))
            module.ops = ops
        yield


SEEN = {
    LastAlone: {"test_gradients_are_summed_over_data_ranks", "test_clip_measures_the_whole_gradient",
                "test_clip_scales_to_the_norm_asked_for"},
    ScalesTwice: {"test_clip_scales_to_the_norm_asked_for"},
    ClipsAtZero: {"test_gradients_are_summed_over_data_ranks"},
    NormAfter: {"test_clip_measures_the_whole_gradient"},
    LeavesOut: {"test_full_state_is_whole", "test_clip_measures_the_whole_gradient",
                "test_gradients_are_summed_over_data_ranks", "test_one_micro_batch_is_enough",
                "test_clip_scales_to_the_norm_asked_for", "test_tied_weights_stay_one"},
    Renames: {"test_full_state_is_whole", "test_gradients_are_summed_over_data_ranks", "test_one_micro_batch_is_enough",
              "test_clip_scales_to_the_norm_asked_for", "test_tied_weights_stay_one"},
    Forgets: {"test_an_evaluation_leaves_the_weights_as_they_are"},
    Doubles: {"test_total_sums_over_data_ranks", "test_loss_is_that_of_one_rank", "test_tied_weights_stay_one"},
}  # fmt: skip


@pytest.mark.parametrize("replicas", SEEN, ids=lambda r: r.__name__)
def test_on_one_rank(replicas):
    class Kit(ParallelContract):
        component = wrong(replicas)

    assert set(failures(Kit)) == SEEN[replicas]


def test_forgets_the_tie():
    class Kit(ParallelContract):
        component = wrong(Unties)

    assert "test_tied_weights_stay_one" in failures(Kit)


def test_a_layout_that_leaves_ranks_out():
    @frozen(kw_only=True, eq=False)
    class Pairs(Replicated):
        """Pairs."""

        @hookimpl
        def probe(self, request):
            return Accept(why="in pairs", layout=Layout(data=max(1, request.world_size // 2 * 2)))

    class Kit(ParallelContract):
        component = Pairs()

    assert set(failures(Kit)) == {"test_layouts_fill_the_world"}
