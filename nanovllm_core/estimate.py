"""How much memory a run needs on one device, before anything is built.

Weights, gradients and both AdamW moments are exact (4 bytes each a parameter: fp32 masters). Activations count what the
native transformer keeps for its backward; other models differ. Expect the total within some 30 % until the estimate is
calibrated against measurements.
"""

from __future__ import annotations

from attrs import frozen

from nanovllm_core.contracts import Shape

LOSS_ROWS = 1024  # rows of logits that exist at once


@frozen(kw_only=True)
class Memory:
    """Bytes by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def training_memory(shape: Shape, *, tokens: int, dtype: str) -> Memory:
    """What training holds with `tokens` tokens in a micro-batch and `dtype` compute ("float32" | "bfloat16")."""
    size = 2 if dtype == "bfloat16" else 4
    query, cache = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = (
        4 * shape.hidden + 3 * (query + cache) + 2 * query + cache + 3 * shape.intermediate
    )  # values a token and block
    casts = shape.parameters * size if size == 2 else 0
    return Memory(
        weights=4 * shape.parameters + casts,
        gradients=4 * shape.parameters,
        optimizer=8 * shape.parameters,
        activations=tokens * (kept * shape.layers + 2 * shape.hidden) * size,
        loss=2 * min(tokens, LOSS_ROWS) * shape.vocab_size * 4 + shape.vocab_size * shape.hidden * 4,
    )
