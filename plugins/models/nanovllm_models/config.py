"""The outlines of the native models, and the names and shapes of their parameters; no tensors here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from attrs import field, frozen

from nanovllm_core.contracts import Module, Ops, Shape

HEAD = "lm_head.weight"


@frozen(kw_only=True)
class ModelConfig:
    """What every native model has; a subclass adds what its module needs."""

    OPERATIONS: ClassVar[tuple[str, ...]]
    EMBEDDING: ClassVar[str]  # its parameter's name, which a tied head shares
    LIMITS: ClassVar[Mapping[str, str]] = {}  # as `Shape.limits`

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    max_positions: int
    norm_eps: float
    remarks: tuple[str, ...] = field(default=(), eq=False)  # what a user should know of how its config.json was taken

    @property
    def window(self) -> int | None:
        """As `Shape.window`."""
        return None

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every parameter; tied weights stand once, as the embedding."""
        raise NotImplementedError

    def stored(self, names: Iterable[str]) -> dict[str, str]:
        """Parameter -> the tensor of a folder that holds it, for those `names` that are no buffers."""
        raise NotImplementedError

    def build(self, ops: Ops) -> Module:
        """The module, on meta."""
        raise NotImplementedError


def outline(c: ModelConfig, *, dtype: str) -> Shape:
    """A config's Shape."""
    return Shape(
        family=c.family,
        vocab_size=c.vocab_size,
        layers=c.layers,
        hidden=c.hidden,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate=c.intermediate,
        tied=c.tied,
        max_positions=c.max_positions,
        parameters=sum(math.prod(shape) for shape in c.parameter_shapes().values()),
        operations=c.OPERATIONS,
        dtype=dtype,
        qk_norm=isinstance(c, TransformerConfig) and c.qk_norm,
        window=c.window,
        limits=c.LIMITS,
    )


@frozen(kw_only=True)
class Rope:
    """Rotary positions. `kind` is "default", "linear" or "llama3"; the rest belongs to the two that stretch."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original: int = 8192  # positions before stretching


@frozen(kw_only=True)
class TransformerConfig(ModelConfig):
    """RMS norm before each half of a block, grouped-query attention with rotary positions, SwiGLU."""

    OPERATIONS = ("embedding", "linear", "rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")
    EMBEDDING = "model.embed_tokens.weight"

    rope: Rope = Rope()
    attention_bias: bool = False  # on the query, key, value and output projections
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()  # of each block's attention, None: all that came before; empty: None for all

    @property
    def qkv_bias(self) -> bool:
        """The query, key and value projections have biases."""
        return self.attention_bias or self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Query and key heads are normalised before rotation."""
        return self.family == "qwen3"

    @property
    def window(self) -> int | None:
        return min((w for w in self.windows if w is not None), default=None)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        query, cache, hidden, mlp = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.hidden,
            self.intermediate,
        )
        linears = {
            "self_attn.q_proj": (query, hidden, self.qkv_bias),
            "self_attn.k_proj": (cache, hidden, self.qkv_bias),
            "self_attn.v_proj": (cache, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, query, self.attention_bias),
            "mlp.gate_proj": (mlp, hidden, self.mlp_bias),
            "mlp.up_proj": (mlp, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, mlp, self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {self.EMBEDDING: (self.vocab_size, hidden)}
        for i in range(self.layers):
            for name, (rows, columns, bias) in linears.items():
                shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
            for name, size in norms.items():
                shapes[f"model.layers.{i}.{name}.weight"] = (size,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocab_size, hidden)
        return shapes

    def stored(self, names: Iterable[str]) -> dict[str, str]:
        return {name: name for name in names if not name.endswith("rotary_emb.inv_freq")}

    def build(self, ops: Ops) -> Module:
        import torch

        from nanovllm_models.transformer import Transformer

        with torch.device("meta"):
            return Transformer(self, ops)
