"""The native decoder-only transformer of the Llama, Mistral, Qwen2 and Qwen3 families (`contracts.Module`).

It is only wiring: every operation is a callable of `Ops`, on plain local tensors of packed documents. Parameters have
the Hugging Face names, so loading and export are copies; tied weights are one Parameter, under the embedding's name.
There are no buffers: cos and sin are made once a forward, from positions, in fp32, and handed to the blocks. A block
knows neither its index nor the others, so blocks can be sharded, compiled and checkpointed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nanovllm_core.contracts import KV, Batch, Ops
from nanovllm_models.config import TransformerConfig
from nanovllm_models.modules import Matrices, Weights, logits_or_loss, matrices
from nanovllm_models.rope import cos_sin

ROLES: Mapping[str, str] = {
    "model.embed_tokens.weight": "vocab",
    "lm_head.weight": "vocab",
    **{f"model.layers.*.self_attn.{p}_proj.*": "column" for p in "qkv"},
    "model.layers.*.self_attn.o_proj.weight": "row",
    **{f"model.layers.*.mlp.{p}_proj.*": "column" for p in ("gate", "up")},
    "model.layers.*.mlp.down_proj.weight": "row",
}
"""How tensor parallelism splits parameters; what no pattern names (norms, biases of row splits) every rank holds."""


class Transformer(nn.Module):
    """Tokens to logits, or to the summed loss. Make it under `torch.device("meta")` and fill it by name."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops, self.roles = config, ops, ROLES
        self.model = _Body(config, ops)
        if not config.tied:
            self.lm_head = Weights(config.vocab_size, config.hidden)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.layers

    def forward(
        self, tokens: Tensor, batch: Batch, kv: Sequence[KV] | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """tokens [T] int64. With targets [T]: the summed loss, fp32 scalar. Else fp32 logits [n, V] of `batch.select`."""
        x_TC = self.model(tokens, batch, kv)
        head_VC = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return logits_or_loss(self.ops, x_TC, head_VC, batch, targets)


class _Body(nn.Module):
    """Embedding, blocks, final norm: [T] -> [T, C]."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = Weights(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(_Block(config, ops, window) for window in config.windows or (None,) * config.layers)
        self.norm = Weights(config.hidden)

    def forward(self, tokens: Tensor, batch: Batch, kv: Sequence[KV] | None) -> Tensor:
        cos_TH, sin_TH = cos_sin(self.config.rope, self.config.head_dim, batch.positions)
        x_TC = self.ops.embedding(tokens, self.embed_tokens.weight)
        caches: Sequence[KV | None] = [None] * len(self.layers) if kv is None else kv
        more_TC: Tensor | None = None
        for block, cache in zip(self.layers, caches, strict=True):
            x_TC, more_TC = block(x_TC, more_TC, cos_TH, sin_TH, batch, cache)
        if more_TC is not None:
            x_TC = x_TC + more_TC
        return self.ops.rms_norm(x_TC, self.norm.weight, self.config.norm_eps)


class _Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to its input.

    In generation what the MLP adds is handed on to the next block, whose norm adds it on its way; a block that trains keeps its
    input, which would be two tensors then.
    """

    def __init__(self, config: TransformerConfig, ops: Ops, window: int | None) -> None:
        super().__init__()
        self.eps, self.ops = config.norm_eps, ops
        self.input_layernorm = Weights(config.hidden)
        self.self_attn = _Attention(config, ops, window)
        self.post_attention_layernorm = Weights(config.hidden)
        self.mlp = _MLP(config, ops)

    def forward(
        self, x_TC: Tensor, more_TC: Tensor | None, cos_TH: Tensor, sin_TH: Tensor, batch: Batch, kv: KV | None
    ) -> tuple[Tensor, Tensor | None]:
        x_TC, *qkv = self.ops.norm_linear(
            x_TC, more_TC, self.input_layernorm.weight, self.eps, *self.self_attn.projections
        )
        found_TC = self.self_attn(*qkv, cos_TH, sin_TH, batch, kv)
        x_TC, gate, up = self.ops.norm_linear(
            x_TC, found_TC, self.post_attention_layernorm.weight, self.eps, *self.mlp.projections
        )
        out_TC = self.mlp(gate, up)
        return (x_TC + out_TC, None) if kv is None else (x_TC, out_TC)


class _Attention(nn.Module):
    def __init__(self, config: TransformerConfig, ops: Ops, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.eps, self.window, self.ops = config.head_dim, config.norm_eps, window, ops
        query, cache = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Weights(query, config.hidden, bias=config.qkv_bias)
        self.k_proj = Weights(cache, config.hidden, bias=config.qkv_bias)
        self.v_proj = Weights(cache, config.hidden, bias=config.qkv_bias)
        self.o_proj = Weights(config.hidden, query, bias=config.attention_bias)
        self.q_norm = Weights(config.head_dim) if config.qk_norm else None
        self.k_norm = Weights(config.head_dim) if config.qk_norm else None

    @property
    def projections(self) -> Matrices:
        return matrices(self.q_proj, self.k_proj, self.v_proj)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cos_TH: Tensor, sin_TH: Tensor, batch: Batch, kv: KV | None
    ) -> Tensor:
        ops, h = self.ops, self.head_dim
        # A tensor-parallel rank holds part of the heads.
        q_TNH, k_TKH, v_TKH = [x.view(x.shape[0], x.shape[1] // h, h) for x in (q, k, v)]
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
            q_TNH, k_TKH = ops.norm_rotary(q_TNH, k_TKH, *norms, self.eps, cos_TH, sin_TH)
        else:
            q_TNH, k_TKH = ops.rotary(q_TNH, k_TKH, cos_TH, sin_TH)
        o_TNH = ops.attend(q_TNH, k_TKH, v_TKH, batch, kv, self.window)
        return ops.linear(o_TNH.flatten(1), *matrices(self.o_proj))


class _MLP(nn.Module):
    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_proj = Weights(config.intermediate, config.hidden, bias=config.mlp_bias)
        self.up_proj = Weights(config.intermediate, config.hidden, bias=config.mlp_bias)
        self.down_proj = Weights(config.hidden, config.intermediate, bias=config.mlp_bias)

    @property
    def projections(self) -> Matrices:
        return matrices(self.gate_proj, self.up_proj)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.ops.swiglu_linear(gate, up, *matrices(self.down_proj))
