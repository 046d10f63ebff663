"""What crosses between parts: documents, tokenizers, shapes, operations, modules, layouts. attrs only, no heavy import."""

from nanovllm_core.contracts.choices import Accept, Decision, Refuse, Verdict
from nanovllm_core.contracts.documents import Damage, Document, ModelRef, Record, Segment, Source, Tokenizer
from nanovllm_core.contracts.models import (
    IGNORE,
    KV,
    LIMITS,
    Batch,
    CachingModule,
    Draws,
    KernelRequest,
    MicroBatch,
    Module,
    Paging,
    RowState,
    Shape,
    Step,
)
from nanovllm_core.contracts.ops import GENERATION, JOINED, OPERATIONS, Ops
from nanovllm_core.contracts.parallel import Layout, Parallelized, ParallelRequest

__all__ = [
    "GENERATION", "IGNORE", "JOINED", "KV", "LIMITS", "OPERATIONS", "Accept", "Batch", "CachingModule", "Damage", "Decision",
    "Document", "Draws", "KernelRequest", "Layout", "MicroBatch", "ModelRef", "Module", "Ops", "Paging", "ParallelRequest",
    "Parallelized", "Record", "Refuse", "RowState", "Segment", "Shape", "Source", "Step", "Tokenizer", "Verdict",
]  # fmt: skip
