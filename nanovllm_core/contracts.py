"""What crosses between parts: documents, tokenizers, shapes, operations, modules, layouts. attrs only, no heavy import.

Shape legend, used in every module that holds tensors:
    T tokens of a packed batch   D documents in it    B sequences being generated   S positions of a cache row
    N query heads                K key/value heads    H size of one head            C hidden size    V vocabulary rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NewType, NoReturn, Protocol

from attrs import field, frozen

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

IGNORE = -100  # a target that is not trained
OPERATIONS = ("embedding", "linear", "rms_norm", "rotary", "swiglu", "attention", "linear_cross_entropy")

ModelRef = NewType("ModelRef", str)
"""An option that names a model: a folder (relative ones count from the recipe's folder) or a hub name."""


# ---------------------------------------------------------------- decisions


@frozen
class Accept:
    """A probe's yes. The highest priority wins; `why` is shown by `nanovllm explain`."""

    priority: int = 0
    why: str = ""
    layout: Layout | None = None  # parallel strategies say how they would lay the ranks out


@frozen
class Refuse:
    """A probe's no, with its reason."""

    why: str


Verdict = Accept | Refuse


@frozen
class Decision:
    """A value that was chosen automatically, and why."""

    value: int
    why: str


# ---------------------------------------------------------------- documents


@frozen
class Source:
    """One thing a reader may open: a file, or (`exists` false) a string in `data.path` that is no file."""

    path: str  # absolute for files; verbatim otherwise
    name: str  # relative to data.path, with forward slashes: what metadata and messages show
    size: int = 0  # bytes
    exists: bool = True


@frozen
class Record:
    """One value as it stood in a source: a string or any JSON value."""

    value: Any
    source: str  # Source.name
    line: int | None = None  # 1-based, for line formats
    index: int = 0  # 0-based within the source
    byte: int = 0  # where it begins in the source

    @property
    def place(self) -> str:
        """`file:line` or `file[index]`, for messages."""
        return f"{self.source}:{self.line}" if self.line is not None else f"{self.source}[{self.index}]"


@frozen
class Segment:
    """A stretch of text. Untrained text is context only. A `role` lets a chat template frame it."""

    text: str
    trained: bool = True
    role: str | None = None  # "user" | "assistant" | "system"


@frozen
class Document:
    """What is trained on: segments in order, and where they came from."""

    segments: tuple[Segment, ...]
    source: str
    index: int = 0

    @property
    def text(self) -> str:
        """All segments joined by newlines."""
        return "\n".join(s.text for s in self.segments)


class Tokenizer(Protocol):
    """A ready tokenizer. Text of a document never becomes a special token; only `markup=True` text may."""

    vocab_size: int  # ids are in [0, vocab_size)
    prefix_ids: tuple[int, ...]  # opens every document and prompt (usually a begin token, or nothing)
    end_id: int  # closes every document
    stop_ids: tuple[int, ...]  # generation stops at any of these; holds end_id
    fingerprint: str  # changes whenever the same text could give other ids
    has_chat_template: bool
    special_texts: tuple[str, ...]  # what `markup=True` reads as special tokens, e.g. "<|im_end|>"

    def encode(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Ids of each text, without prefix or end. `markup` reads special tokens written in the text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """The chat template applied: markup text. `answer_next` ends where the assistant would begin."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` opens."""
        ...


# ---------------------------------------------------------------- models and operations


@frozen(kw_only=True)
class Shape:
    """A model's outline: enough to plan memory, kernels and parallel layout without building it."""

    family: str
    vocab_size: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    max_positions: int
    parameters: int
    operations: tuple[str, ...]  # of OPERATIONS, those that the model calls
    dtype: str = "float32"  # of the weights it starts from; the exported folder keeps it


@frozen(kw_only=True)
class KernelRequest:
    """Which implementation is wanted: of what operation, where, in what compute dtype."""

    operation: str
    device: str  # "cpu" | "cuda"
    dtype: str  # "float32" | "bfloat16"
    shape: Shape
    training: bool = True
    tensor: int = 1  # tensor-parallel degree


class KV(Protocol):
    """The keys and values of one block during generation."""

    def update(self, k_TKH: Tensor, v_TKH: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Store the new tokens. None after a prefill; else all keys and values so far, [B, S, K, H]."""
        ...


@frozen(kw_only=True, eq=False)
class Batch:
    """Whole documents (or windows of them) laid end to end: attention never crosses their borders."""

    positions: Tensor  # [T] int64, restarting at each document
    lengths: tuple[int, ...]  # of the D documents, on the host; sums to T
    cu_seqlens: Tensor  # [D + 1] int32, running sum of lengths, on the device
    select: Tensor | None = None  # [n] int64: positions whose logits are wanted; None: all
    slots: Tensor | None = None  # [T] int64: cache row of each token, in generation
    context: int = 0  # decoding: longest sequence so far, this token included; 0: prefill or training


@frozen(kw_only=True, eq=False)
class MicroBatch:
    """What one forward and backward see."""

    tokens: Tensor  # [T] int64
    targets: Tensor  # [T] int64, the next token, or IGNORE
    batch: Batch
    trained: int  # targets that are not IGNORE


@frozen(kw_only=True, eq=False)
class Step:
    """One rank's part of an optimizer step. The position in a run is one number: sequences consumed by all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    trained: int  # targets of the whole step, over all ranks: what its loss is divided by
    tokens: int  # of the whole step, over all ranks
    next_position: int
    epoch: float  # how many times the data has been seen after this step


def _absent(operation: str) -> Callable[..., NoReturn]:
    def call(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"the model calls {operation!r} but its Shape.operations does not list it")

    return call


def _operation(name: str) -> Any:
    return field(factory=lambda: _absent(name))


@frozen(kw_only=True, eq=False)
class Ops:
    """The chosen kernels: plain callables on local tensors, one object shared by all blocks.

    embedding(ids_T, weight_VC) -> x_TC in the compute dtype
    linear(x, weight_OI, bias_O | None) -> x @ weight.T + bias in x's dtype
    rms_norm(x_..C, weight_C, eps) -> x * rsqrt(mean(x^2) + eps) * weight, statistics in fp32
    rotary(q_TNH, k_TKH, cos_TH, sin_TH) -> (q, k) rotated by halves; cos and sin in fp32
    swiglu(gate, up) -> silu(gate) * up
    attention(q_TNH, k_TKH, v_TKH, batch, kv=None) -> o_TNH, causal within each document, scale H**-0.5
    linear_cross_entropy(x_TC, weight_VC, targets_T) -> sum of -log softmax(x @ weight.T)[target] in fp32, IGNORE left out
    """

    dtype: str  # compute dtype
    embedding: Callable[..., Tensor] = _operation("embedding")
    linear: Callable[..., Tensor] = _operation("linear")
    rms_norm: Callable[..., Tensor] = _operation("rms_norm")
    rotary: Callable[..., tuple[Tensor, Tensor]] = _operation("rotary")
    swiglu: Callable[..., Tensor] = _operation("swiglu")
    attention: Callable[..., Tensor] = _operation("attention")
    linear_cross_entropy: Callable[..., Tensor] = _operation("linear_cross_entropy")


class Module(Protocol):
    """A language model as trainer, strategies and engine see it: also a `torch.nn.Module`.

    Parameter names are the Hugging Face names. Tied means one Parameter, named as the embedding.
    """

    ops: Ops
    blocks: Sequence[torch.nn.Module]  # sharded, compiled, checkpointed one by one
    roles: Mapping[str, str]  # parameter-name pattern (fnmatch) -> "column" | "row" | "vocab"

    def __call__(
        self, tokens: Tensor, batch: Batch, kv: Sequence[KV] | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """tokens [T] int64. With targets [T]: the summed loss, fp32 scalar. Else logits [n, V] of `batch.select`."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...


# ---------------------------------------------------------------- parallel


@frozen
class Layout:
    """How ranks are spread: replicas x shards x tensor slices."""

    data: int = 1
    shard: int = 1
    tensor: int = 1


@frozen(kw_only=True)
class ParallelRequest:
    """What a strategy is asked to run."""

    world_size: int
    device: str
    shape: Shape
    memory_needed: int  # bytes on one device, were nothing sharded
    memory_available: int  # bytes on one device; 0 when unknown


class Parallelized(Protocol):
    """A module as a strategy runs it. After the last micro-batch gradients are the sum over data ranks."""

    module: Module
    data_rank: int
    data_size: int

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; communication may wait for the last."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum over data ranks."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients to at most this global L2 norm (0: never); the norm before scaling."""
        ...

    def full_state(self) -> Iterable[tuple[str, Tensor]]:
        """Every parameter in full, one at a time, by its Hugging Face name."""
        ...
