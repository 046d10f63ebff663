"""Gated causal convolutions over packed documents (`contracts.CachingModule`).

A block mixes the tokens before each token by a depthwise convolution, channel by channel, and gates it:
`x + out(silu(gate(norm x)) * conv(in(norm x)))`; gated convolutions as in Dauphin et al., 2017, dilated as in van den
Oord et al., 2016. A tap that would reach over the beginning of a document reads zero. What generation needs is the last
`(kernel - 1) * dilation` inputs of each convolution: the same size however long the text is.

I channels of a convolution   B sequences being generated   W tokens that a convolution looks back
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm_conv.config import ConvConfig
from nanovllm_core.contracts import Batch, Ops


class ConvModel(nn.Module):
    """Tokens to logits, or to the summed loss."""

    def __init__(self, config: ConvConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.roles: Mapping[str, str] = {}
        self.model = _Body(config, ops)
        self.blocks: Sequence[nn.Module] = tuple(self.model.layers)  # a tuple: torch registers them once

    def forward(
        self, tokens: Tensor, batch: Batch, kv: Sequence[Past] | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """tokens [T] int64. With targets [T]: the summed loss, fp32 scalar. Else fp32 logits [n, V] of `batch.select`."""
        x_TC, head_VC = self.model(tokens, batch, kv), self.model.embed_tokens.weight
        if targets is not None:
            return self.ops.linear_cross_entropy(x_TC, head_VC, targets)
        return self.ops.linear(x_TC if batch.select is None else x_TC[batch.select], head_VC, None).float()

    def new_cache(self, rows: int, device: str) -> list[Past]:
        """Empty state for `rows` sequences, one object a block."""
        c, dtype = self.config, getattr(torch, self.ops.dtype)
        return [
            Past(torch.zeros(rows, (c.kernel - 1) * d, c.intermediate, dtype=dtype, device=device)) for d in c.dilations
        ]


class Past:
    """The last W inputs of one convolution, a ring a row: the input of position p is at p modulo W."""

    def __init__(self, rings_BWI: Tensor) -> None:
        self.rings_BWI = rings_BWI

    def keep(self, x_TI: Tensor, batch: Batch) -> None:
        """Remember the newest W inputs of each sequence; the others are not needed again."""
        assert batch.slots is not None
        width = self.rings_BWI.shape[1]
        if batch.context:
            new: Tensor | slice = slice(None)
        else:
            lengths_D = batch.cu_seqlens.diff()
            new = batch.positions >= lengths_D.repeat_interleave(lengths_D) - width
        self.rings_BWI[batch.slots[new], batch.positions[new] % width] = x_TI[new].to(self.rings_BWI.dtype)

    def back(self, by: int, batch: Batch) -> Tensor:
        """The input `by` tokens before each sequence's newest, [B, I]; what was before its beginning is not zero."""
        return self.rings_BWI[batch.slots, (batch.positions - by) % self.rings_BWI.shape[1]]

    def move(self, source: int, target: int) -> None:
        """Let the sequence of row `source` go on in row `target`."""
        self.rings_BWI[target] = self.rings_BWI[source]


class _Body(nn.Module):
    def __init__(self, config: ConvConfig, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = config.norm_eps, ops
        self.embed_tokens = _Weights(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(_Block(config, dilation, ops) for dilation in config.dilations)
        self.norm = _Weights(config.hidden)

    def forward(self, tokens: Tensor, batch: Batch, kv: Sequence[Past] | None) -> Tensor:
        x_TC = self.ops.embedding(tokens, self.embed_tokens.weight)
        pasts: Sequence[Past | None] = [None] * len(self.layers) if kv is None else kv
        for block, past in zip(self.layers, pasts, strict=True):
            x_TC = block(x_TC, batch, past)
        return self.ops.rms_norm(x_TC, self.norm.weight, self.eps)


class _Block(nn.Module):
    def __init__(self, config: ConvConfig, dilation: int, ops: Ops) -> None:
        super().__init__()
        self.eps, self.dilation, self.ops = config.norm_eps, dilation, ops
        self.norm = _Weights(config.hidden)
        self.gate_proj = _Weights(config.intermediate, config.hidden)
        self.in_proj = _Weights(config.intermediate, config.hidden)
        self.conv = _Weights(config.intermediate, config.kernel)
        self.out_proj = _Weights(config.hidden, config.intermediate)

    def forward(self, x_TC: Tensor, batch: Batch, past: Past | None) -> Tensor:
        ops = self.ops
        h_TC = ops.rms_norm(x_TC, self.norm.weight, self.eps)
        mixed_TI = self.convolve(ops.linear(h_TC, self.in_proj.weight, None), batch, past)
        gated_TI = ops.swiglu(ops.linear(h_TC, self.gate_proj.weight, None), mixed_TI)
        return x_TC + ops.linear(gated_TI, self.out_proj.weight, None)

    def convolve(self, x_TI: Tensor, batch: Batch, past: Past | None) -> Tensor:
        """Each token's own channels and those 1, 2, ... dilations before it, weighted; [T, I]."""
        taps_KI = self.conv.weight.to(x_TI.dtype).t()
        out_TI = x_TI * taps_KI[0]
        for k in range(1, len(taps_KI)):
            by = k * self.dilation
            if batch.context:
                assert past is not None, "decoding needs the state of `new_cache`"
                earlier_TI = past.back(by, batch)
            elif by < len(x_TI):
                earlier_TI = F.pad(x_TI[:-by], (0, 0, by, 0))
            else:
                break  # no document of the batch is that long
            inside_T1 = (batch.positions >= by).unsqueeze(1)
            out_TI = out_TI + earlier_TI.masked_fill(~inside_T1, 0) * taps_KI[k]
        if past is not None:
            past.keep(x_TI, batch)
        return out_TI


class _Weights(nn.Module):
    """A parameter under its name; what is done with it is an operation's business."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
