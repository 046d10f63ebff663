"""Copies of weights in oneDNN's own layout, made at first use and gone with their weight.

A packed matrix is read at the memory's full speed, a plain one at two thirds of it; the price is as much memory again as
the matrix has. A copy is for one weight as it was: it is made anew where the weight was written to (its version, which
`copy_`, `load_state_dict` and optimizers count up) or given other memory. What is written through `weight.data` no one
counts. A view is known by what it is a view of, since a model may make it anew at every call.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

HINT = 16  # tokens that the layout is made for: of 1, 16 and 256 the one that is best from 1 to 64


@frozen(eq=False)
class _Copy:
    of: tuple[tuple[Any, ...], ...]  # what each weight was
    others: tuple[weakref.ref[Tensor], ...]  # the bases of all but the first: an address may be given out again
    packed: Tensor


class Packed:
    """Packed copies of weights; several in one are their concatenation by rows."""

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()  # first weight -> layout of the call -> its copy

    def __call__(self, *weights: Tensor) -> Tensor | None:
        """The copy for these weights [O, I]; None where changes to one of them would not be seen."""
        if any(w.is_inference() for w in weights):
            return None
        bases = [w if w._base is None else w._base for w in weights]
        as_it_is = tuple((w._version, w.data_ptr(), w.shape, w.stride(), w.dtype) for w in weights)
        of_first = self._copies.setdefault(bases[0], {})
        key = (len(weights), weights[0].storage_offset(), weights[0].shape)
        copy = of_first.get(key)
        if (
            copy is None
            or copy.of != as_it_is
            or any(r() is not b for r, b in zip(copy.others, bases[1:], strict=True))
        ):
            copy = _Copy(as_it_is, tuple(weakref.ref(b) for b in bases[1:]), packed(*weights))
            of_first[key] = copy
        return copy.packed

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()

    def __len__(self) -> int:
        return sum(len(of_first) for of_first in self._copies.values())


def packed(*weights: Tensor) -> Tensor:
    """The concatenation by rows in oneDNN's layout; fp32 where this CPU cannot take bf16."""
    whole = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
    try:
        return _reorder(whole)
    except RuntimeError:
        return _reorder(whole.float())


def product(x_TI: Tensor, packed_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x @ weight.T + bias in x's dtype."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x_TI.to(packed_OI.dtype), packed_OI, None if bias_O is None else bias_O.to(packed_OI.dtype), "none", [], ""
    )
    return made.to(x_TI.dtype)


def _reorder(weight_OI: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight_OI.contiguous(), HINT)
    return made
