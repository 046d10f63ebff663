"""Copies of weights in oneDNN's own layout, made at first use and gone with their weights.

A packed matrix is read at nearly the memory's full speed, a plain one at two thirds of it, and several in one copy are one
call; the price is as much memory again as the matrices have. A copy is for its weights as they were: it is made anew where
one was written to (its version, which `copy_`, `load_state_dict` and optimizers count up) or was given other memory. What is
written through `weight.data` no one counts. A view is known by what it is a view of, since a model may make it anew at
every call. A hundred copies are looked up in a step, at 2 us each: hence plain loops and an index by address.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from attrs import field, frozen
from torch import Tensor

HINT = 16  # tokens that the layout is made for: of 1, 16 and 256 the one that is best from 1 to 64

Matrices = tuple[Tensor | None, ...]  # weight_OI, bias_O | None, weight, ...


@frozen(eq=False)
class Was:
    """A tensor as it was: its base (or itself), version, address, and of a view the form."""

    base: ref[Tensor]
    version: int
    address: int
    form: tuple[Any, ...] | None

    def same(self, tensor: Tensor) -> bool:
        """Whether it is that tensor, written to or not."""
        if self.form is None:
            return self.base() is tensor
        base = tensor._base
        return base is not None and self.base() is base and self.form == _form(tensor)

    def unchanged(self, tensor: Tensor) -> bool:
        return self.same(tensor) and tensor._version == self.version and tensor.data_ptr() == self.address


@frozen(eq=False)
class Copy:
    """Matrices with one input, one under the other."""

    packed_OI: Tensor
    bias_O: Tensor | None
    rows: tuple[int, ...]  # of each matrix
    was: tuple[Was | None, ...]

    def products(self, x_TI: Tensor) -> tuple[Tensor, ...]:
        """x @ weight.T + bias of each matrix, in x's dtype."""
        dtype = x_TI.dtype
        made: Tensor = multiply(x_TI.to(self.packed_OI.dtype), self.packed_OI, self.bias_O, "none", [], "")
        made = made.to(dtype)
        return (made,) if len(self.rows) == 1 else made.split_with_sizes(self.rows, 1)

    def of(self, matrices: Matrices, test: Any = Was.unchanged) -> bool:
        """Whether it was made of these tensors, and they are as they were."""
        if len(matrices) != len(self.was):
            return False
        for tensor, was in zip(matrices, self.was, strict=True):
            if tensor is None or was is None:
                if tensor is not was:
                    return False
            elif not test(was, tensor):
                return False
        return True


@frozen(eq=False)
class Packed:
    """The copies of one model's weights, or of several models'."""

    copies: dict[int, list[Copy]] = field(
        factory=dict
    )  # by the address of the first weight, or of what it is a view of

    def __call__(self, matrices: Matrices) -> Copy | None:
        """The copy for these matrices, made where there is none; None where changes to one of them would not be seen."""
        first = matrices[0]
        assert first is not None
        known = self.copies.get(id(first)) or self.copies.get(id(first._base)) or []
        for copy in known:
            if copy.of(matrices):
                return copy
        if any(t is not None and t.is_inference() for t in matrices):
            return None
        key, me = id(_base(first)), ref(self)

        def forget(_: object) -> None:  # another tensor may be given the address
            if (packed := me()) is not None:
                packed.copies.pop(key, None)

        was = tuple(
            None
            if t is None
            else Was(ref(_base(t), forget), t._version, t.data_ptr(), _form(t) if t._is_view() else None)
            for t in matrices
        )
        weights = [w.detach() for w in matrices[::2] if w is not None]
        packed_OI = pack(weights[0] if len(weights) == 1 else torch.cat(weights))
        copy = Copy(packed_OI, _joined(weights, matrices[1::2], packed_OI.dtype), tuple(map(len, weights)), was)
        self.copies[key] = [*(c for c in known if not c.of(matrices, Was.same)), copy]
        return copy

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()


def _joined(weights: list[Tensor], biases: Matrices, dtype: torch.dtype) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs]).to(dtype)


def pack(weight_OI: Tensor) -> Tensor:
    """In oneDNN's layout; fp32 where this CPU cannot take bf16."""
    reorder = torch.ops.mkldnn._reorder_linear_weight.default
    try:
        made: Tensor = reorder(weight_OI.contiguous(), HINT)
    except RuntimeError:
        made = reorder(weight_OI.float().contiguous(), HINT)
    return made


multiply = torch.ops.mkldnn._linear_pointwise.default


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()
