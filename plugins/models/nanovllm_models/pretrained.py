"""The `pretrained` model: a Hugging Face model folder of a supported family, on a native module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from nanovllm_core.contracts import Accept, ModelRef, Module, Ops, Refuse, Shape, Verdict
from nanovllm_core.errors import ModelError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_models.config import HEAD, ModelConfig, outline
from nanovllm_models.families import from_huggingface
from nanovllm_models.opening import Opened, config_of, open_model

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True, eq=False)
class Pretrained:
    """A pretrained Llama, Mistral, Qwen2, Qwen3 or GPT-2, from a folder, a .gguf file or the Hugging Face hub.

    path: the model's folder or .gguf file (relative ones count from the recipe's folder), or its hub name, such as
      Qwen/Qwen3-0.6B
    """

    path: ModelRef

    @hookimpl
    def probe(self) -> Verdict:
        try:
            c = self._config(config_of(self.path))
        except ModelError as e:
            return Refuse(str(e))
        return Accept(0, "; ".join((f"{c.family} on a native module", *c.remarks)))

    @hookimpl
    def tokenizer(self) -> Mapping[str, Any]:
        return {"use": "hf", "path": self.path}

    @hookimpl
    def shape(self, vocab_size: int) -> Shape:
        """The outline of the folder's model, after comparing the tensors that it holds with those that it should."""
        folder = self._folder()
        c = self._config(folder.config)
        if vocab_size > c.vocab_size:
            raise ModelError(
                f"{self.path}: the tokenizer has {vocab_size:,} ids, the model's embedding has {c.vocab_size:,} rows. "
                "Use the model's own tokenizer (leave `tokenizer` out of the recipe)"
            )
        self._compare(folder, c)
        return outline(c, dtype=folder.dtype)

    @hookimpl
    def build(self, shape: Shape, ops: Ops) -> Module:
        return self._config(self._folder().config).build(ops)

    @hookimpl
    def weight(self, shape: Shape, name: str, seed: int) -> Tensor:
        """The parameter as stored, in the stored dtype."""
        import torch

        folder = self._folder()
        c = self._config(folder.config)
        expected, stored = c.parameter_shapes().get(name), c.stored(folder.names())
        if expected is None:
            raise ModelError(f"{self.path}: this model has no parameter {name!r}")
        source = stored.get(name, name)
        if folder.shape(source) != expected:
            raise self._misshapen(folder, source, expected)
        tensor = folder.tensor(source)
        if shape.tied and name == c.EMBEDDING and HEAD in stored and not torch.equal(tensor, folder.tensor(HEAD)):
            raise ModelError(
                f"{self.path}: config.json says tie_word_embeddings, but {HEAD} and {source} are stored and differ. "
                "Set tie_word_embeddings to false in config.json if the output layer was trained apart"
            )
        return tensor

    @hookimpl
    def config(self, shape: Shape) -> dict[str, Any]:
        return dict(self._folder().config)

    def _folder(self) -> Opened:
        return open_model(self.path)

    def _config(self, config: Mapping[str, Any]) -> ModelConfig:
        try:
            return from_huggingface(config)
        except ModelError as e:
            raise ModelError(f"{self.path}: {e}") from None

    def _compare(self, folder: Opened, c: ModelConfig) -> None:
        expected, stored = c.parameter_shapes(), c.stored(folder.names())
        missing = [name for name in expected if name not in stored]
        known = {*expected, HEAD} if c.tied else set(expected)
        unknown = sorted(stored[name] for name in stored.keys() - known)
        if missing or unknown:
            raise ModelError(
                f"{self.path}: its tensors are not those of a {c.family} model with {c.layers} layers. "
                f"Missing: {_some(missing)}. Unknown: {_some(unknown)}"
            )
        for name, wanted in expected.items():
            if folder.shape(stored[name]) != wanted:
                raise self._misshapen(folder, stored[name], wanted)

    def _misshapen(self, folder: Opened, name: str, wanted: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"{self.path}: {name} is stored as {list(folder.shape(name))}, config.json says {list(wanted)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
