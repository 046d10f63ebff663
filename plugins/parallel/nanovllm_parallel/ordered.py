"""Replicas whose gradients are summed in one order, whatever their number: bit-identical training on 1, 2, 4, ... ranks.

The micro-batches of a step, a power of two, are the leaves of a binary tree, and sums are taken up the tree. A rank's leaves
are a whole branch, so it adds them up alone; then every rank gathers all branches and adds those up the tree too. What it
costs: a gradient kept for each level of a rank's branch, and an all-gather of whole gradients after the last backward, where
an all-reduce would have run beside it and moved less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nanovllm_core.contracts import Layout, Module
from nanovllm_parallel.collectives import all_gather
from nanovllm_parallel.local import Local
from nanovllm_parallel.spread import Group

PIECE = 1 << 24  # values that are gathered at once

Gradients = list[Tensor | None]


class Ordered(Group):
    """`Parallelized` over replicas, or for one rank."""

    def __init__(self, module: Module, layout: Layout, mesh: Any) -> None:
        super().__init__(module, layout, mesh)
        self.branches: list[tuple[int, Gradients]] = []  # leaves, and their sum; each has more leaves than the next

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        parameters = [p for _, p in self.module.named_parameters()]
        count, mine = 1, [p.grad for p in parameters]
        while self.branches and self.branches[-1][0] == count:
            half, before = self.branches.pop()
            count, mine = count + half, [_added(a, b) for a, b in zip(before, mine, strict=True)]
        self.branches.append((count, mine))
        for p in parameters:
            p.grad = None
        if last:
            assert len(self.branches) == 1, "the micro-batches of a rank are a power of two"
            self.branches = []
            for p, gradient in zip(parameters, mine, strict=True):
                p.grad = None if gradient is None else self._over_ranks(gradient)

    clip = Local.clip  # every rank has all of the gradient

    def _over_ranks(self, branch: Tensor) -> Tensor:
        if not self.groups:
            return branch
        [group] = self.groups
        flat = branch.view(-1)
        for start in range(0, len(flat), PIECE):
            piece = flat[start : start + PIECE]
            gathered = piece.new_empty(self.data_size * len(piece))
            all_gather(gathered, piece, group=group)
            all_WN = gathered.view(self.data_size, -1)
            while len(all_WN) > 1:
                all_WN = all_WN[0::2] + all_WN[1::2]
            piece.copy_(all_WN[0])
        return branch


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a.add_(b)
