"""Tensor parallelism with sequence parallelism (Shoeybi et al., 2019; Korthikanti et al., 2022), by a model's roles.

Matrices are split by `roles` (column: rows of weight and bias; row: columns of weight; vocab: rows of the table). Between
them a rank of the group holds its part of the tokens: the embedding leaves each rank its part, a column-split product
gathers all tokens first, a row-split one sums the products and leaves each rank its part again. So norms and additions are
done once, and every parameter that is not split gets its gradient summed over the group.

The model knows nothing of this: it calls the operations of its Ops, and those are replaced by ones that look at how the
weight that they are handed is laid out. Tokens are padded to a multiple of the group's size in between.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from nanovllm_core.contracts import Module, Ops
from nanovllm_core.errors import NanoError, RefusedError
from nanovllm_core.training.sharding import chunk
from nanovllm_parallel.collectives import all_gather, reduce_scatter
from nanovllm_parallel.vocab_loss import vocab_cross_entropy

SPLIT = {"column": 0, "vocab": 0, "row": 1}  # role -> the dimension of a weight that is split


def slice_by_roles(module: Module, mesh: Any) -> None:
    """Split the parameters of a module on meta over the ranks of a one-axis mesh, and put its operations in place."""
    assert isinstance(module, nn.Module)
    owners = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items() if p is not None]
    names = {id(p): name for name, p in module.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    roles = {name: _role(module, name) for name in names.values()}
    if not {"column", "row"} <= set(roles.values()):
        raise RefusedError(
            "parallel: the model does not say how its matrices split (`roles`), so no tensor parallelism"
        )
    for owner, key, p in owners:
        if id(p) not in made:
            made[id(p)] = _split(p, roles[names[id(p)]], mesh)
        owner._parameters[key] = made[id(p)]
    ops = Sliced(module.ops, mesh.get_group(), mesh.get_local_rank(), mesh.size()).ops
    for part in module.modules():
        if getattr(part, "ops", None) is not None:
            part.ops = ops


def _role(module: Module, name: str) -> str:
    return next((role for pattern, role in module.roles.items() if fnmatchcase(name, pattern)), "")


def _split(p: nn.Parameter, role: str, mesh: Any) -> nn.Parameter:
    placement: Any
    dim = SPLIT.get(role)
    if dim is None or dim >= p.ndim:  # a row-split matrix's bias is added once, after the sum
        placement, mine = Replicate(), p.detach()
    else:
        placement, mine = Shard(dim), chunk(p.detach(), dim, mesh.size(), mesh.get_local_rank())
    mine = torch.empty_like(mine, memory_format=torch.contiguous_format)
    spread = DTensor.from_local(mine, mesh, [placement], run_check=False, shape=p.shape, stride=p.stride())
    return nn.Parameter(spread, requires_grad=p.requires_grad)


class Sliced:
    """The operations of one rank of a tensor group."""

    def __init__(self, ops: Ops, group: Any, rank: int, size: int) -> None:
        self.plain, self.group, self.rank, self.size = ops, group, rank, size
        self.tokens = 0  # of the micro-batch that is under way
        self._gather, self._scatter = (
            partial(_gather, group=group, size=size),
            partial(_scatter, group=group, size=size),
        )
        self._reduce = partial(_all_reduced, group=group)
        self.seen: tuple[Tensor, Tensor] | None = None  # the input gathered last, and what was gathered
        self.ops = evolve(
            ops,
            embedding=self.embedding,
            linear=self.linear,
            rms_norm=self.rms_norm,
            layer_norm=self.layer_norm,
            linear_cross_entropy=self.linear_cross_entropy,
            head=self.logits,
            joined={},  # they take whole weights
        )

    # ------------------------------------------------------------ operations

    def embedding(self, ids_T: Tensor, weight: Tensor) -> Tensor:
        self.tokens = len(ids_T)
        if not _split_along(weight, 0):
            return self.plain.embedding(self._mine(ids_T), self._shared(weight))
        table, first = self._slice(weight)
        ids_T = ids_T - first
        here_T = (ids_T >= 0) & (ids_T < len(table))
        found_TC = self.plain.embedding(ids_T.where(here_T, 0), table)
        return self._summed(found_TC.masked_fill(~here_T.unsqueeze(1), 0))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _split_along(weight, 0):
            b = None if bias is None else bias.to_local()  # type: ignore[operator]
            return self.plain.linear(self._gathered(x), self._slice(weight)[0], b)
        if _split_along(weight, 1):
            product = self.plain.linear(x, weight.to_local(), None)  # type: ignore[operator]
            summed = self._summed(product)
            return summed if bias is None else summed + self._shared(bias).to(summed.dtype)
        return self.plain.linear(x, self._shared(weight), None if bias is None else self._shared(bias))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.plain.rms_norm(x, self._shared(weight), eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return self.plain.layer_norm(x, self._shared(weight), self._shared(bias), eps)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, targets_T: Tensor) -> Tensor:
        x_TC = self._gathered(x)
        self.seen = None
        if _split_along(weight, 0):
            table, first = self._slice(weight)
            return vocab_cross_entropy(x_TC, table, targets_T, first, self.group)
        # Every rank makes the whole loss: a share each, so that their gradients add up to one.
        loss = self.plain.linear_cross_entropy(x_TC, self._shared(weight), targets_T)
        return _There.apply(loss, _same, lambda grad: grad / self.size)

    def logits(self, x: Tensor, weight: Tensor, select: Tensor | None) -> Tensor:
        """Every rank gets all of them; no gradient goes back through the exchange of the vocabulary's parts."""
        x_TC = self._gathered(x)
        self.seen = None
        if select is not None:
            x_TC = x_TC[select]
        if not _split_along(weight, 0):
            return self.plain.linear(x_TC, self._shared(weight), None)
        table, _ = self._slice(weight)
        each = -(-weight.shape[0] // self.size)
        mine = F.pad(self.plain.linear(x_TC, table, None), (0, each - len(table)))
        if mine.requires_grad:
            raise NanoError("logits over tensor slices have no gradient; train with targets")
        parts = _gather(mine, self.group, self.size).view(self.size, len(x_TC), each)
        return parts.transpose(0, 1).flatten(1)[:, : weight.shape[0]]

    # ------------------------------------------------------------ parts

    def _slice(self, weight: Any) -> tuple[Tensor, int]:
        """This rank's rows of a table, and the number of the first."""
        each = -(-weight.shape[0] // self.size)
        return weight.to_local(), min(self.rank * each, weight.shape[0])

    def _shared(self, weight: Any) -> Tensor:
        """A parameter that every rank holds and uses for a part: its gradient is summed."""
        return _There.apply(weight.to_local() if isinstance(weight, DTensor) else weight, _same, self._reduce)

    def _mine(self, x_T: Tensor) -> Tensor:
        """This rank's part of something that every rank has, padded at the end."""
        return _padded(x_T, self.size).chunk(self.size)[self.rank]

    def _gathered(self, x: Tensor) -> Tensor:
        """All tokens of what each rank holds a part of. Several matrices of one input gather it once."""
        if self.seen is None or self.seen[0] is not x:
            self.seen = (x, _There.apply(x, self._gather, self._scatter)[: self.tokens])
        return self.seen[1]

    def _summed(self, partial_TC: Tensor) -> Tensor:
        """The sum over ranks, of which each keeps its part of the tokens."""
        return _There.apply(_padded(partial_TC, self.size), self._scatter, self._gather)


def _split_along(weight: Tensor, dim: int) -> bool:
    return isinstance(weight, DTensor) and weight.placements[-1].is_shard(dim)


def _padded(x: Tensor, size: int) -> Tensor:
    more = -len(x) % size
    return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, more)) if more else x


def _gather(x: Tensor, group: Any, size: int) -> Tensor:
    whole = x.new_empty(len(x) * size, *x.shape[1:])
    all_gather(whole, x.contiguous(), group=group)
    return whole


def _scatter(x: Tensor, group: Any, size: int) -> Tensor:
    mine = x.new_empty(len(x) // size, *x.shape[1:])
    reduce_scatter(mine, x.contiguous(), group=group)
    return mine


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _all_reduced(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    distributed.all_reduce(x, group=group)
    return x


class _There(torch.autograd.Function):
    """One way forward, another back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None
