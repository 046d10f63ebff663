"""`nanovllm.training` of the user's guide, over `nanovllm_core`; names load on first use."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm_core.analyze import analyze_document_collection
    from nanovllm_core.guide.dataset import MultiDocumentDataset, collate, prepare_datasets
    from nanovllm_core.guide.loop import create_optimizer, create_scheduler
    from nanovllm_core.guide.model import create_model_from_scratch
    from nanovllm_core.guide.tokenizers import CustomTokenizer

PLACES = MappingProxyType({
    "CustomTokenizer": "guide.tokenizers",
    "MultiDocumentDataset": "guide.dataset",
    "analyze_document_collection": "analyze",
    "collate": "guide.dataset",
    "create_model_from_scratch": "guide.model",
    "create_optimizer": "guide.loop",
    "create_scheduler": "guide.loop",
    "prepare_datasets": "guide.dataset",
})  # fmt: skip

__all__ = [
    "CustomTokenizer", "MultiDocumentDataset", "analyze_document_collection", "collate", "create_model_from_scratch",
    "create_optimizer", "create_scheduler", "prepare_datasets",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"nanovllm_core.{PLACES[name]}"), name)
