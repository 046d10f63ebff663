"""What the native models share: parameters under their Hugging Face names, and the last step to logits or loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm_core.contracts import Batch, Ops


class Weights(nn.Module):
    """Parameters; what is done with them is an operation's business."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None


Matrices = tuple[Tensor | None, ...]  # weight, bias | None, weight, ...


def matrices(*projections: Weights) -> Matrices:
    """Weight and bias of each, as `Ops.norm_linear` takes them."""
    return tuple(x for p in projections for x in (p.weight, p.bias))


def logits_or_loss(ops: Ops, x_TC: Tensor, head_VC: Tensor, batch: Batch, targets_T: Tensor | None) -> Tensor:
    """With targets the summed loss, an fp32 scalar; else logits [n, V] of `batch.select` in the compute dtype."""
    if targets_T is not None:
        return ops.linear_cross_entropy(x_TC, head_VC, targets_T)
    return ops.logits(x_TC, head_VC, batch.select)
