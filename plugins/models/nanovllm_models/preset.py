"""The `preset` model: a transformer of a named size, from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from nanovllm_core.contracts import Accept, Module, Ops, Shape, Verdict
from nanovllm_core.errors import ModelError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.options import at_least, one_of
from nanovllm_models.config import Rope, TransformerConfig, outline
from nanovllm_models.families.llama import ARCHITECTURES, to_huggingface

if TYPE_CHECKING:
    from torch import Tensor

SIZES: Mapping[str, tuple[int, int, int]] = {  # hidden, layers, heads
    "tiny": (256, 4, 4),
    "small": (512, 8, 8),
    "medium": (1024, 16, 16),
    "large": (2048, 24, 32),
}
HEAD_DIM = 64
STD = 0.02  # of random matrices


@frozen(kw_only=True, eq=False)
class Preset:
    """A new transformer of a preset size, from random weights.

    size: tiny (hidden 256, 4 layers, 4 heads), small (512, 8, 8), medium (1024, 16, 16) or large (2048, 24, 32)
    family: the architecture that other tools see it as: qwen3, qwen2, llama or mistral
    tied: the output layer shares the embedding's weights
    kv_heads: key/value heads; null means half of the heads
    intermediate: width of the MLP; null means three times hidden
    max_position_embeddings: longest context in tokens that the model is declared for
    """

    size: str = field(default="small", validator=one_of(*SIZES))
    family: str = field(default="qwen3", validator=one_of(*ARCHITECTURES))
    tied: bool = True
    kv_heads: int | None = field(default=None, validator=at_least(1))
    intermediate: int | None = field(default=None, validator=at_least(1))
    max_position_embeddings: int = field(default=4096, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        heads = SIZES[self.size][2]
        if self.kv_heads is not None and heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide the {heads} heads of size {self.size}")

    @hookimpl
    def probe(self) -> Verdict:
        return Accept(0, "random weights, nothing to fetch")

    @hookimpl
    def tokenizer(self) -> Mapping[str, Any]:
        return {"use": "bpe"}

    @hookimpl
    def shape(self, vocab_size: int) -> Shape:
        if vocab_size < 1:
            raise ModelError(f"model preset: a vocabulary of {vocab_size} ids has no model")
        c = self._config(vocab_size)
        return outline(c, dtype="float32")

    @hookimpl
    def build(self, shape: Shape, ops: Ops) -> Module:
        return self._config(shape.vocab_size).build(ops)

    @hookimpl
    def weight(self, shape: Shape, name: str, seed: int) -> Tensor:
        """Norms one, biases zero, matrices normal with std 0.02; those that write to the residual stream are smaller
        by sqrt(2 * layers), so that its variance does not grow with depth (GPT-2; Radford et al., 2019)."""
        import hashlib

        import torch

        shapes = self._config(shape.vocab_size).parameter_shapes()
        if name not in shapes:
            raise ModelError(f"model preset: has no parameter {name!r}")
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name])
        if name.endswith(".bias"):
            return torch.zeros(shapes[name])
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = STD / (2 * shape.layers) ** 0.5 if residual else STD
        return torch.empty(shapes[name]).normal_(0.0, std, generator=generator)

    @hookimpl
    def config(self, shape: Shape) -> dict[str, Any]:
        return to_huggingface(self._config(shape.vocab_size), shape.dtype)

    def _config(self, vocab_size: int) -> TransformerConfig:
        hidden, layers, heads = SIZES[self.size]
        return TransformerConfig(
            family=self.family,
            vocab_size=vocab_size,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=self.kv_heads or heads // 2,
            head_dim=HEAD_DIM,
            intermediate=self.intermediate or 3 * hidden,
            tied=self.tied,
            max_positions=self.max_position_embeddings,
            norm_eps=1e-6,
            rope=Rope(theta=10_000.0),
        )
