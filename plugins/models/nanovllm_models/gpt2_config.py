"""The outline of GPT-2, and the names and shapes of its parameters; no tensors here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from nanovllm_core.contracts import Module, Ops
from nanovllm_models.config import HEAD, ModelConfig

PREFIX = "transformer."
_BUFFER = re.compile(r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which old folders carry


@frozen(kw_only=True)
class Gpt2Config(ModelConfig):
    """Learned positions, LayerNorm before each half of a block, full multi-head attention, GELU, biases everywhere."""

    OPERATIONS = ("embedding", "linear", "layer_norm", "gelu", "attention", "linear_cross_entropy")
    EMBEDDING = "transformer.wte.weight"
    LIMITS = {"tensor": "query, key and value are one matrix (c_attn), whose columns do not fall into heads"}

    gelu_tanh: bool  # GELU by its tanh approximation

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, mlp = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            self.EMBEDDING: (self.vocab_size, hidden),
            "transformer.wpe.weight": (self.max_positions, hidden),
        }
        matrices = {  # stored [in, out], other than a linear layer's
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, mlp),
            "mlp.c_proj": (mlp, hidden),
        }
        norms = [f"transformer.h.{i}.{name}" for i in range(self.layers) for name in ("ln_1", "ln_2")]
        for i in range(self.layers):
            for name, (inputs, outputs) in matrices.items():
                shapes[f"transformer.h.{i}.{name}.weight"] = (inputs, outputs)
                shapes[f"transformer.h.{i}.{name}.bias"] = (outputs,)
        for name in (*norms, "transformer.ln_f"):
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocab_size, hidden)
        return shapes

    def stored(self, names: Iterable[str]) -> dict[str, str]:
        """The first GPT-2 folders were saved without the head's module, so their names lack its prefix."""
        kept = [name for name in names if not _BUFFER.fullmatch(name)]
        prefix = "" if any(name.startswith(PREFIX) for name in kept) else PREFIX
        return {name if name == HEAD else prefix + name: name for name in kept}

    def build(self, ops: Ops) -> Module:
        import torch

        from nanovllm_models.gpt2 import GPT2

        with torch.device("meta"):
            return GPT2(self, ops)
