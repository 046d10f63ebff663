"""The `conv` model: new from random weights, or opened again from a folder that it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import deep_iterable

from nanovllm_conv.config import MODEL_TYPE, ConvConfig, parameter_count, parameter_shapes
from nanovllm_core.contracts import Accept, ModelRef, Module, Ops, Refuse, Shape, Verdict
from nanovllm_core.errors import ModelError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.hub import resolve
from nanovllm_core.options import at_least, between
from nanovllm_core.weights import ModelFolder, read_config

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN, KERNEL, DILATIONS = 256, 4, (1, 4, 16, 64)
STD = 0.02  # of random matrices
LENGTH = 1 << 20  # tokens; no position is learned, so this bounds the work asked for and not the model
LIMITS = {"tensor": "splitting its convolutions over ranks has not been tried"}
OPERATIONS = ("embedding", "linear", "rms_norm", "swiglu", "linear_cross_entropy")


@frozen(kw_only=True, eq=False)
class Conv:
    """Gated causal convolutions instead of attention; new, or from a folder that it wrote.

    path: a folder that this component wrote; leave the other options out then
    hidden: width of the residual stream; null means 256
    intermediate: channels of the convolutions; null means twice the width
    kernel: taps of each convolution; null means 4
    dilations: tokens between two taps, one number a block; null means [1, 4, 16, 64], which looks back over 255 tokens
    """

    path: ModelRef | None = None
    hidden: int | None = field(default=None, validator=at_least(1))
    intermediate: int | None = field(default=None, validator=at_least(1))
    kernel: int | None = field(default=None, validator=between(2, 64))
    dilations: tuple[int, ...] | None = field(default=None)

    @dilations.validator
    def _sound(self, attribute: Any, value: tuple[int, ...] | None) -> None:
        if value is not None:
            if not value:
                raise ValueError("got an empty list, expected one number a block")
            deep_iterable(at_least(1))(self, attribute, value)

    def __attrs_post_init__(self) -> None:
        if self.path is not None:
            for name in ("hidden", "intermediate", "kernel", "dilations"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to a new model; the folder in `path` says its own, leave it out")

    @hookimpl
    def probe(self) -> Verdict:
        """A new model always; a folder when its config.json is one of ours."""
        if self.path is None:
            return Accept(0, "random weights, nothing to fetch")
        try:
            ConvConfig.from_json(read_config(resolve(self.path, weights=False)))
        except ModelError as e:
            return Refuse(str(e) if self.path in str(e) else f"{self.path}: {e}")
        return Accept(0, f"its config.json says {MODEL_TYPE}")

    @hookimpl
    def tokenizer(self) -> Mapping[str, Any]:
        """A new model builds a vocabulary; a folder holds its own tokenizer."""
        return {"use": "bpe"} if self.path is None else {"use": "hf", "path": self.path}

    @hookimpl
    def shape(self, vocab_size: int) -> Shape:
        """Raises ModelError when the folder's tensors or the tokenizer do not fit its config.json."""
        c = self._config(vocab_size)
        if vocab_size > c.vocab_size:
            raise ModelError(f"{self.path}: the tokenizer has {vocab_size} ids, the model {c.vocab_size} rows")
        folder = self._folder()
        if folder is not None:
            held, wanted = {n: folder.shape(n) for n in folder.names()}, parameter_shapes(c)
            if held != wanted:
                wrong = sorted(n for n in {*held, *wanted} if held.get(n) != wanted.get(n))
                raise ModelError(
                    f"{self.path}: {wrong[0]}: stored as {held.get(wrong[0])}, config.json says {wanted.get(wrong[0])}"
                )
        return Shape(
            family=MODEL_TYPE,
            vocab_size=c.vocab_size,
            layers=len(c.dilations),
            hidden=c.hidden,
            intermediate=c.intermediate,
            tied=True,
            max_positions=LENGTH,
            parameters=parameter_count(c),
            operations=OPERATIONS,
            dtype="float32" if folder is None else folder.dtype,
            own_cache=True,
            limits=LIMITS,
        )

    @hookimpl
    def build(self, shape: Shape, ops: Ops) -> Module:
        """The module on meta."""
        import torch

        from nanovllm_conv.module import ConvModel

        with torch.device("meta"):
            return ConvModel(self._config(shape.vocab_size), ops)

    @hookimpl
    def weight(self, shape: Shape, name: str, seed: int) -> Tensor:
        """From the folder, or random: norms one, taps so that a convolution keeps the variance, matrices std 0.02."""
        import torch

        c = self._config(shape.vocab_size)
        wanted = parameter_shapes(c).get(name)
        if wanted is None:
            raise ModelError(f"model conv: has no parameter {name!r}")
        if (folder := self._folder()) is not None:
            return folder.tensor(name)
        if name.endswith("norm.weight"):
            return torch.ones(wanted)
        std = STD
        if name.endswith("conv.weight"):
            std = c.kernel**-0.5
        elif name.endswith("out_proj.weight"):
            std /= len(c.dilations) ** 0.5  # so that the residual stream's variance does not grow with depth
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.empty(wanted).normal_(0.0, std, generator=generator)

    @hookimpl
    def config(self, shape: Shape) -> dict[str, Any]:
        """`config.json`, from which this component opens the folder again."""
        return self._config(shape.vocab_size).to_json()

    def _folder(self) -> ModelFolder | None:
        return None if self.path is None else ModelFolder.open(resolve(self.path))

    def _config(self, vocab_size: int) -> ConvConfig:
        if self.path is not None:
            return ConvConfig.from_json(read_config(resolve(self.path, weights=False)))
        hidden = self.hidden or HIDDEN
        return ConvConfig(
            vocab_size=vocab_size,
            hidden=hidden,
            intermediate=self.intermediate or 2 * hidden,
            kernel=self.kernel or KERNEL,
            dilations=self.dilations or DILATIONS,
        )
