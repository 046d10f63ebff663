"""The import names of the user's guide, over `nanovllm_core`; they load on first use."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm_core import LLM, SamplingParams
    from nanovllm_core.guide.config import TrainingConfig
    from nanovllm_core.guide.trainer import Trainer

PLACES = MappingProxyType({
    "LLM": "nanovllm_core",
    "SamplingParams": "nanovllm_core",
    "Trainer": "nanovllm_core.guide.trainer",
    "TrainingConfig": "nanovllm_core.guide.config",
    "__version__": "nanovllm_core",
})  # fmt: skip

__all__ = ["LLM", "SamplingParams", "Trainer", "TrainingConfig"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
