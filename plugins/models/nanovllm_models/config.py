"""The outline of a native transformer, and the names and shapes of its parameters; no tensors here."""

from __future__ import annotations

import math

from attrs import frozen


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
class TransformerConfig:
    """A decoder-only transformer: RMS norm before each half of a block, grouped-query attention, SwiGLU."""

    family: str  # "llama" | "qwen3"
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
    rope: Rope = Rope()
    attention_bias: bool = False  # on the query, key, value and output projections
    mlp_bias: bool = False

    @property
    def qk_norm(self) -> bool:
        """Query and key heads are normalised before rotation."""
        return self.family == "qwen3"


OPERATIONS = ("embedding", "linear", "rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")


def parameter_shapes(c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every parameter; tied weights stand once, as the embedding."""
    query, cache, mlp = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.intermediate
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden)}
    linears = {
        "self_attn.q_proj": (query, c.hidden, c.attention_bias),
        "self_attn.k_proj": (cache, c.hidden, c.attention_bias),
        "self_attn.v_proj": (cache, c.hidden, c.attention_bias),
        "self_attn.o_proj": (c.hidden, query, c.attention_bias),
        "mlp.gate_proj": (mlp, c.hidden, c.mlp_bias),
        "mlp.up_proj": (mlp, c.hidden, c.mlp_bias),
        "mlp.down_proj": (c.hidden, mlp, c.mlp_bias),
    }
    norms = {"input_layernorm": c.hidden, "post_attention_layernorm": c.hidden}
    if c.qk_norm:
        norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
    for i in range(c.layers):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (c.hidden,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden)
    return shapes


def parameter_count(c: TransformerConfig) -> int:
    """Number of values in all parameters, tied ones once."""
    return sum(math.prod(shape) for shape in parameter_shapes(c).values())
