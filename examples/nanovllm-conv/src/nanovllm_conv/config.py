"""The outline of a convolutional language model, its `config.json`, and the names and shapes of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from nanovllm_core.errors import ModelError

MODEL_TYPE = "nanovllm_conv"
NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "conv_kernel")


@frozen(kw_only=True)
class ConvConfig:
    """A stack of gated causal convolutions; block i looks back over `(kernel - 1) * dilations[i]` tokens."""

    vocab_size: int
    hidden: int
    intermediate: int
    kernel: int
    dilations: tuple[int, ...]  # one a block
    norm_eps: float = 1e-6

    @property
    def reach(self) -> int:
        """Tokens that an output depends on, its own included."""
        return 1 + sum((self.kernel - 1) * d for d in self.dilations)

    def to_json(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        return {
            "architectures": ["NanovllmConvForCausalLM"],
            "model_type": MODEL_TYPE,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": len(self.dilations),
            "conv_kernel": self.kernel,
            "dilations": list(self.dilations),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": True,
        }

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ConvConfig:
        """Undo `to_json`. Raises ModelError for another model's configuration, or a broken one."""
        if (given := config.get("model_type")) != MODEL_TYPE:
            raise ModelError(f"config.json: model_type: got {given!r}, opened here: {MODEL_TYPE!r}")
        for key in NUMBERS:
            if not _positive(config.get(key)):
                raise ModelError(f"config.json: {key}: got {config.get(key)!r}, expected a number of at least 1")
        dilations, eps = config.get("dilations"), config.get("rms_norm_eps")
        if not isinstance(dilations, list) or not dilations or not all(map(_positive, dilations)):
            raise ModelError(f"config.json: dilations: got {dilations!r}, expected a list of numbers of at least 1")
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ModelError(f"config.json: rms_norm_eps: got {eps!r}, expected a number between 0 and 1")
        vocab_size, hidden, intermediate, kernel = (config[key] for key in NUMBERS)
        return cls(
            vocab_size=vocab_size,
            hidden=hidden,
            intermediate=intermediate,
            kernel=kernel,
            dilations=tuple(dilations),
            norm_eps=eps,
        )


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def parameter_shapes(c: ConvConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; the output layer is the embedding."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden)}
    for i in range(len(c.dilations)):
        shapes |= {
            f"model.layers.{i}.norm.weight": (c.hidden,),
            f"model.layers.{i}.gate_proj.weight": (c.intermediate, c.hidden),
            f"model.layers.{i}.in_proj.weight": (c.intermediate, c.hidden),
            f"model.layers.{i}.conv.weight": (c.intermediate, c.kernel),
            f"model.layers.{i}.out_proj.weight": (c.hidden, c.intermediate),
        }
    return shapes | {"model.norm.weight": (c.hidden,)}


def parameter_count(c: ConvConfig) -> int:
    """Number of values in all parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(c).values())
