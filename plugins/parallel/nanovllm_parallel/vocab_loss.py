"""Linear layer and cross-entropy where each rank of a group holds some rows of the vocabulary.

Rank r makes logits of its rows alone; the largest logit, the sum of exponentials and the target's logit are exchanged,
three numbers a token (Shoeybi et al., 2019). As in the plain operation, logits exist for some tokens at a time and the
gradients are made in the forward. The gradient of x is this rank's share of it: whoever made x from parts adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from nanovllm_core.contracts import IGNORE

CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits of a chunk


def vocab_cross_entropy(x_TC: Tensor, weight_RC: Tensor, targets_T: Tensor, first: int, group: Any) -> Tensor:
    """Sum of -log softmax(x @ whole weight.T)[target] over targets that are not IGNORE: a scalar, the same on all ranks.

    `weight_RC`: this rank's rows, of which `first` is the number of the first.
    """
    return _VocabCrossEntropy.apply(x_TC, weight_RC, targets_T, first, group)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, first: int, group: Any) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        high = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(x.dtype)
        loss = torch.zeros((), dtype=high, device=x.device)
        d_x = torch.zeros_like(x) if needs_x else None
        d_weight = torch.zeros(weight.shape, dtype=high, device=x.device) if needs_weight else None
        rows = max(64, CHUNK.get(x.device.type, CHUNK["cuda"]) // max(1, len(weight)))
        for start in range(0, len(x), rows):
            x_NC, target_N = x[start : start + rows], targets[start : start + rows]
            logits_NR = (x_NC @ w.t()).to(high)
            top_N = logits_NR.amax(1) if len(w) else logits_NR.new_full((len(x_NC),), -torch.inf)
            distributed.all_reduce(top_N, distributed.ReduceOp.MAX, group=group)
            trained_N, mine_N = target_N != IGNORE, target_N - first
            here_N = trained_N & (mine_N >= 0) & (mine_N < len(w))
            mine_N1 = mine_N.where(here_N, 0).unsqueeze(1)
            logits_NR.sub_(top_N.unsqueeze(1))
            picked_N = logits_NR.gather(1, mine_N1).squeeze(1).where(here_N, 0) if len(w) else torch.zeros_like(top_N)
            exp_NR = logits_NR.exp_()
            both_2N = torch.stack([exp_NR.sum(1), picked_N])
            distributed.all_reduce(both_2N, group=group)
            loss += (both_2N[0].log() - both_2N[1]).where(trained_N, 0).sum()
            if not (needs_x or needs_weight):
                continue
            d_NR = exp_NR.div_(both_2N[0].unsqueeze(1))
            if len(w):
                d_NR.scatter_add_(1, mine_N1, -here_N.to(high).unsqueeze(1))
            d_NR = d_NR.mul_(trained_N.unsqueeze(1)).to(x.dtype)
            if d_x is not None:
                d_x[start : start + rows] = d_NR @ w
            if d_weight is not None:
                d_weight += d_NR.t() @ x_NC
        ctx.gradients = (d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_x, d_weight = ctx.gradients
        return (
            None if d_x is None else d_x * grad.to(d_x.dtype),
            None if d_weight is None else d_weight * grad.to(d_weight.dtype),
            None,
            None,
            None,
        )
