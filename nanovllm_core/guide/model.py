"""What the guide's users hold as `model`: one of our modules behind the call that transformers' models have.

`model(**batch)` takes `input_ids`, `attention_mask` and `labels`, [rows, tokens] each, as `collate` and transformers make
them; the module itself gets the rows' tokens packed, so padding costs nothing and attention never crosses a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm_core.assemble import assemble, models_of, tokenizer_of
from nanovllm_core.contracts import IGNORE, Batch, Module, Shape
from nanovllm_core.errors import ModelError
from nanovllm_core.guide.tokenizers import CustomTokenizer, documents_of, ready, vocab_stats
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.training.export import export


class Output(dict[str, Tensor]):
    """What a model gives, by key or as attributes: `loss` where labels were given, `logits` where asked for."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)


class CausalLM(nn.Module):
    """A language model; its parameters have the names that transformers gives them.

    config: what `config.json` holds; shape: its outline
    """

    inner: Any  # the Module, which is not registered: its children are, so that names stay theirs

    def __init__(self, module: Module, shape: Shape, config: dict[str, Any]) -> None:
        super().__init__()
        assert isinstance(module, nn.Module)
        object.__setattr__(self, "inner", module)
        for name, child in module.named_children():
            self.add_module(name, child)
        self.shape, self.config = shape, Config(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool | None = None,
    ) -> Output:
        """The mean loss over the labels that are not -100, each predicted from the ids before it in its row.

        What is on another device than the model is brought there.
        Without labels, or with `return_logits`, also logits [rows, tokens, vocabulary]; zeros where the mask is 0.
        Raises ModelError for shapes that do not fit, or rows that are longer than the model allows.
        """
        place = self.device
        input_ids = input_ids.to(place)
        attention_mask, labels = (None if x is None else x.to(place) for x in (attention_mask, labels))
        real, batch = _packed(input_ids, attention_mask, self.shape.max_positions)
        tokens, out = input_ids[real], Output()
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ModelError(f"labels: got shape {tuple(labels.shape)}, input_ids have {tuple(input_ids.shape)}")
            targets = _targets(labels[real], batch)
            trained = (targets != IGNORE).sum().clamp(min=1)
            out["loss"] = self.inner(tokens, batch, targets=targets) / trained
        if labels is None if return_logits is None else return_logits:
            packed = self.inner(tokens, batch)
            logits = packed.new_zeros(*input_ids.shape, packed.shape[-1])
            out["logits"] = logits.index_put((real.nonzero(as_tuple=True)), packed)
        return out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> CausalLM:
        self.inner.train(mode)
        super().train(mode)
        return self

    def save_pretrained(self, folder: str | Path, tokenizer: Any) -> None:
        """Write a folder that `LLM`, transformers and vLLM open. Raises OutputError."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        export(place, self.inner.named_parameters(), dict(self.config), ready(tokenizer), self.shape.dtype)


class Config(dict[str, Any]):
    """A model's configuration, by key or as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def _packed(input_ids: Tensor, attention_mask: Tensor | None, most: int) -> tuple[Tensor, Batch]:
    """Which ids are real, [rows, tokens] bool, and the rows as documents of one batch."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ModelError(
            f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, expected ids [rows, tokens]"
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ModelError(f"attention_mask: got shape {tuple(real.shape)}, input_ids have {tuple(input_ids.shape)}")
    lengths = [n for n in real.sum(1).tolist() if n]
    if not lengths or max(lengths) > most:
        raise ModelError(f"input_ids: rows of {max(lengths, default=0)} tokens, allowed: 1 to {most}")
    device = input_ids.device
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    return real, Batch(positions=positions, lengths=tuple(lengths), cu_seqlens=bounds)


def _targets(labels: Tensor, batch: Batch) -> Tensor:
    """Labels [T] as what each token is to predict: the next label of its row, none at the row's end."""
    targets = labels.roll(-1)
    targets[batch.cu_seqlens[1:].long() - 1] = IGNORE
    return targets


def create_model_from_scratch(
    documents_path: str | Path,
    model_size: str = "small",
    vocab_size: int | None = None,
    *,
    seed: int = 42,
    mixed_precision: str = "auto",
    registry: Registry | None = None,
) -> tuple[CausalLM, CustomTokenizer, dict[str, Any]]:
    """A new model from random weights, with a vocabulary built from the documents.

    model_size: tiny, small, medium or large; vocab_size: None chooses by the amount of text
    `info`: vocab_stats (see `tokenizers.vocab_stats`), parameter_count, vocab_size, model_size.
    Raises DataError, OptionError.
    """
    registry = registry or Registry.from_environment()
    documents = documents_of(documents_path, registry).documents
    recipe = Recipe.from_data({
        "model": {"use": "preset", "size": model_size},
        "tokenizer": {"use": "auto", "size": vocab_size},
        "train": {"mixed_precision": mixed_precision},
        "parallel": "single",
    })  # fmt: skip
    machine = Machine.detect(1)
    plan = plan_model(recipe, registry, machine, data_bytes=documents.bytes)
    tokenizer = tokenizer_of(plan, lambda: documents.texts())
    module = assemble(plan, machine.device, seed=seed, training=True).module
    model = CausalLM(module, plan.shape, models_of(plan).config(shape=plan.shape))
    info = {
        "vocab_stats": vocab_stats(tokenizer, documents.texts),
        "parameter_count": plan.shape.parameters,
        "vocab_size": tokenizer.vocab_size,
        "model_size": model_size,
    }
    return model, CustomTokenizer.of(tokenizer), info
