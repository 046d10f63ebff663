"""The smallest transformer with everything that strategies must handle: a tied embedding, blocks, roles, packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm_core.contracts import KV, Batch, Ops, Shape

SIZES = MappingProxyType(
    {"vocab_size": 64, "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 64}
)
USED = ("embedding", "linear", "rms_norm", "swiglu", "attention", "linear_cross_entropy")


class Tiny(nn.Module):
    """A `contracts.Module`; positions are not looked at."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.roles = {
            "model.embed_tokens.weight": "vocab",
            **{f"model.layers.*.self_attn.{p}_proj.weight": "column" for p in "qkv"},
            "model.layers.*.self_attn.o_proj.weight": "row",
            **{f"model.layers.*.mlp.{p}_proj.weight": "column" for p in ("gate", "up")},
            "model.layers.*.mlp.down_proj.weight": "row",
        }
        self.model = nn.Module()
        self.model.embed_tokens = _weight(SIZES["vocab_size"], SIZES["hidden"])
        self.model.layers = nn.ModuleList(_Block(ops) for _ in range(SIZES["layers"]))
        self.model.norm = _weight(SIZES["hidden"])

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers)  # type: ignore[arg-type]  # a ModuleList

    def forward(self, tokens: Tensor, batch: Batch, kv: Any = None, targets: Tensor | None = None) -> Tensor:
        model: Any = self.model
        x_TC = self.ops.embedding(tokens, model.embed_tokens.weight)
        for i, block in enumerate(self.blocks):
            x_TC = block(x_TC, batch, None if kv is None else kv[i])
        x_TC = self.ops.rms_norm(x_TC, model.norm.weight, 1e-6)
        if targets is not None:
            return self.ops.linear_cross_entropy(x_TC, model.embed_tokens.weight, targets)
        selected = x_TC if batch.select is None else x_TC[batch.select]
        return self.ops.linear(selected, model.embed_tokens.weight, None)


class _Block(nn.Module):
    def __init__(self, ops: Ops) -> None:
        super().__init__()
        hidden, inner = SIZES["hidden"], SIZES["intermediate"]
        query, cache = (SIZES[n] * SIZES["head_dim"] for n in ("heads", "kv_heads"))
        self.ops = ops
        self.input_layernorm, self.post_attention_layernorm = _weight(hidden), _weight(hidden)
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": _weight(*size) for name, size in zip(
                "qkvo", ((query, hidden), (cache, hidden), (cache, hidden), (hidden, query)), strict=True
            )}
        )  # fmt: skip
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": _weight(inner, hidden),
                "up_proj": _weight(inner, hidden),
                "down_proj": _weight(hidden, inner),
            }
        )

    def forward(self, x_TC: Tensor, batch: Batch, kv: KV | None) -> Tensor:
        ops, attn, mlp = self.ops, self.self_attn, self.mlp
        h_TC = ops.rms_norm(x_TC, self.input_layernorm.weight, 1e-6)
        q, k, v = (_heads(ops.linear(h_TC, attn[f"{n}_proj"].weight, None)) for n in "qkv")
        x_TC = x_TC + ops.linear(ops.attend(q, k, v, batch, kv).flatten(1), attn["o_proj"].weight, None)
        h_TC = ops.rms_norm(x_TC, self.post_attention_layernorm.weight, 1e-6)
        gate, up = (ops.linear(h_TC, mlp[n].weight, None) for n in ("gate_proj", "up_proj"))
        return x_TC + ops.linear(ops.swiglu(gate, up), mlp["down_proj"].weight, None)


def _heads(x: Tensor) -> Tensor:
    return x.view(len(x), -1, SIZES["head_dim"])  # a tensor-parallel rank holds some of the heads, and here all tokens


def _weight(*size: int) -> Any:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.empty(size))
    return holder


def shape() -> Shape:
    """Its outline."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Tiny(Ops(dtype="float32")).parameters())
    sizes: Any = SIZES
    return Shape(family="kit", tied=True, max_positions=64, parameters=count, operations=USED, **sizes)


def weight(name: str, size: Sequence[int]) -> Tensor:
    """Random by name alone; norms near one."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 % 2**31)
    value = torch.randn(size, generator=generator) * 0.1
    return value + 1 if len(size) == 1 else value
