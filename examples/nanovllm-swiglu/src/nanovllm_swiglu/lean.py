"""SwiGLU whose backward needs `gate` and the result, not `up`.

The layer behind keeps the result anyway, as its own input; so of the three activations around a SwiGLU two are kept
instead of three. `up` is the result divided by silu(gate): one division more in the backward, and exact to the last bit
or two of fp32, wherever the result is not so small that bits were lost (below 2**-126, most often because gate or up is
0). There `up` is kept by place, and where there are many such places, whole. It cannot be differentiated twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MANY = 8  # a place and its value take 12 bytes: beyond one place in eight, keeping all of `up` (4 bytes) is not far off


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()  # as a linear layer's outputs are; so places can be counted
        out = F.silu(gate).mul_(up)
        lost = (out.abs() < torch.finfo(out.dtype).tiny).view(-1).nonzero().squeeze(1)
        if len(lost) * MANY > out.numel():
            ctx.save_for_backward(gate, up)
        else:
            ctx.save_for_backward(gate, out, lost, up.view(-1)[lost])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, *rest = ctx.saved_tensors
        silu = F.silu(gate)
        if len(rest) == 1:
            up = rest[0]
        else:
            out, lost, values = rest
            up = torch.div(out, silu)
            up.view(-1)[lost] = values
        d_gate = torch.mul(grad, up)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, silu.mul_(grad)
