"""GPT-2 (Radford et al., 2019; `contracts.Module`): learned positions, LayerNorm, GELU, one matrix for q, k and v.

Like `transformer` it is only wiring over `Ops`, with the Hugging Face names. Its matrices are stored [in, out] there, so
the operations get a transposed view, and export stays a copy. The one matrix of query, key and value cannot be split by
columns over tensor-parallel ranks, so there are no roles. Dropout is not applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nanovllm_core.contracts import KV, Batch, Ops
from nanovllm_models.gpt2_config import Gpt2Config
from nanovllm_models.modules import Weights, logits_or_loss


class GPT2(nn.Module):
    """Tokens to logits, or to the summed loss. Make it under `torch.device("meta")` and fill it by name."""

    def __init__(self, config: Gpt2Config, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.roles: Mapping[str, str] = {}
        self.transformer = _Body(config, ops)
        self.lm_head = None if config.tied else Weights(config.vocab_size, config.hidden)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.transformer.h

    def forward(
        self, tokens: Tensor, batch: Batch, kv: Sequence[KV] | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """tokens [T] int64, positions below `max_positions`. With targets [T]: the summed loss, fp32 scalar. Else fp32
        logits [n, V] of `batch.select`."""
        x_TC = self.transformer(tokens, batch, kv)
        head = self.transformer.wte if self.lm_head is None else self.lm_head
        return logits_or_loss(self.ops, x_TC, head.weight, batch, targets)


class _Body(nn.Module):
    """Embeddings, blocks, final norm: [T] -> [T, C]."""

    def __init__(self, config: Gpt2Config, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = config.norm_eps, ops
        self.wte = Weights(config.vocab_size, config.hidden)
        self.wpe = Weights(config.max_positions, config.hidden)
        self.h = nn.ModuleList(_Block(config, ops) for _ in range(config.layers))
        self.ln_f = Weights(config.hidden, bias=True)

    def forward(self, tokens: Tensor, batch: Batch, kv: Sequence[KV] | None) -> Tensor:
        x_TC = self.ops.embedding(tokens, self.wte.weight) + self.ops.embedding(batch.positions, self.wpe.weight)
        caches: Sequence[KV | None] = [None] * len(self.h) if kv is None else kv
        for block, cache in zip(self.h, caches, strict=True):
            x_TC = block(x_TC, batch, cache)
        return self.ops.layer_norm(x_TC, self.ln_f.weight, self.ln_f.bias, self.eps)


class _Block(nn.Module):
    """Attention, then MLP, each behind a norm and added to its input."""

    def __init__(self, config: Gpt2Config, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = config.norm_eps, ops
        self.ln_1 = Weights(config.hidden, bias=True)
        self.attn = _Attention(config, ops)
        self.ln_2 = Weights(config.hidden, bias=True)
        self.mlp = _MLP(config, ops)

    def forward(self, x_TC: Tensor, batch: Batch, kv: KV | None) -> Tensor:
        h_TC = self.ops.layer_norm(x_TC, self.ln_1.weight, self.ln_1.bias, self.eps)
        x_TC = x_TC + self.attn(h_TC, batch, kv)
        h_TC = self.ops.layer_norm(x_TC, self.ln_2.weight, self.ln_2.bias, self.eps)
        return x_TC + self.mlp(h_TC)


class _Attention(nn.Module):
    def __init__(self, config: Gpt2Config, ops: Ops) -> None:
        super().__init__()
        self.ops, self.heads = ops, config.heads
        self.c_attn = _Conv1D(config.hidden, 3 * config.hidden)
        self.c_proj = _Conv1D(config.hidden, config.hidden)

    def forward(self, x_TC: Tensor, batch: Batch, kv: KV | None) -> Tensor:
        fused = self.ops.linear(x_TC, self.c_attn.weight.t(), self.c_attn.bias)
        q_TNH, k_TNH, v_TNH = fused.view(len(x_TC), 3, self.heads, -1).unbind(1)
        o_TNH = self.ops.attend(q_TNH, k_TNH, v_TNH, batch, kv)
        return self.ops.linear(o_TNH.flatten(1), self.c_proj.weight.t(), self.c_proj.bias)


class _MLP(nn.Module):
    def __init__(self, config: Gpt2Config, ops: Ops) -> None:
        super().__init__()
        self.ops, self.tanh = ops, config.gelu_tanh
        self.c_fc = _Conv1D(config.hidden, config.intermediate)
        self.c_proj = _Conv1D(config.intermediate, config.hidden)

    def forward(self, x_TC: Tensor) -> Tensor:
        inner = self.ops.gelu(self.ops.linear(x_TC, self.c_fc.weight.t(), self.c_fc.bias), self.tanh)
        return self.ops.linear(inner, self.c_proj.weight.t(), self.c_proj.bias)


class _Conv1D(nn.Module):
    """A linear layer's parameters, the weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
