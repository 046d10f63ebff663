"""`nanovllm.training` of the user's guide, over `nanovllm_core`; names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm_core.analyze import analyze_document_collection

__all__ = ["analyze_document_collection"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanovllm_core import analyze

    return getattr(analyze, name)
