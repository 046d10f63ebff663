"""Which families the native modules can be, and how their `config.json` is read; a file a family of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm_core.errors import ModelError, listed
from nanovllm_models.config import ModelConfig
from nanovllm_models.families import gpt2, llama
from nanovllm_models.families.reader import Reader

READERS: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    **dict.fromkeys(llama.ARCHITECTURES, llama.from_huggingface),
    "gpt2": gpt2.from_huggingface,
}


def from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a supported model. Raises ModelError naming what is missing or not supported."""
    family = Reader(config).value("model_type", str)
    if family not in READERS:
        raise ModelError(
            f"config.json: model_type {family!r} is not supported; supported: {listed(READERS)} "
            "(`use: transformers` runs other architectures)"
        )
    return READERS[family](config)
