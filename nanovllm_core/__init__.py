"""The core of nano-vllm: plugin contracts, recipe -> plan -> run, the data path, the training step, the engine.

    from nanovllm_core import Recipe, Registry, Machine, make_plan, run, LLM, SamplingParams

Names load on first use, so that importing this package imports neither torch nor transformers nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm_core.analyze import analyze_document_collection
    from nanovllm_core.contracts import Document, Record, Source
    from nanovllm_core.errors import NanoError
    from nanovllm_core.estimate_model import estimate_training_memory
    from nanovllm_core.hookspecs import hookimpl
    from nanovllm_core.inference.params import SamplingParams
    from nanovllm_core.llm import LLM
    from nanovllm_core.machine import Machine
    from nanovllm_core.plan import Plan, make_plan
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Registry
    from nanovllm_core.runner import run

_HOMES = MappingProxyType(
    {
        "Document": "contracts",
        "LLM": "llm",
        "Machine": "machine",
        "NanoError": "errors",
        "Plan": "plan",
        "Recipe": "recipe",
        "Record": "contracts",
        "Registry": "registry",
        "SamplingParams": "inference.params",
        "Source": "contracts",
        "analyze_document_collection": "analyze",
        "estimate_training_memory": "estimate_model",
        "hookimpl": "hookspecs",
        "make_plan": "plan",
        "run": "runner",
    }
)

__all__ = [
    "LLM", "Document", "Machine", "NanoError", "Plan", "Recipe", "Record", "Registry", "SamplingParams", "Source",
    "analyze_document_collection", "estimate_training_memory", "hookimpl", "make_plan", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("nanovllm")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
