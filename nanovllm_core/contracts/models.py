"""A model as everyone else sees it: its outline, its batches, the operations that it calls, its module.

Shape legend, used in every module that holds tensors:
    T tokens of a packed batch   D documents in it    B sequences being generated   S positions of a cache row
    N query heads                K key/value heads    H size of one head            C hidden size    V vocabulary rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

from nanovllm_core.contracts.ops import Ops

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100  # a target that is not trained
LIMITS = ("packing", "cache", "tensor")  # what a model may be unable to do


def _read_only(given: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(given))


@frozen(kw_only=True)
class Shape:
    """A model's outline: enough to plan memory, kernels and parallel layout without building it."""

    family: str
    vocab_size: int
    layers: int
    hidden: int
    heads: int = 0  # 0 here and below: the model has none
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    tied: bool
    max_positions: int
    parameters: int
    operations: tuple[str, ...]  # of OPERATIONS, those that the model calls; the rest it does by itself
    dtype: str = "float32"  # of the weights it starts from; the exported folder keeps it
    qk_norm: bool = False  # query and key heads are normalised, so they are kept once more for the backward
    window: int | None = None  # some block's attention looks back at most this many tokens, the token itself included
    own_cache: bool = (
        False  # the module keeps what generation needs by itself (`CachingModule`), not as keys and values
    )
    limits: Mapping[str, str] = field(
        factory=dict, hash=False, converter=_read_only
    )  # of LIMITS, what it cannot do -> why
    """packing: documents of a batch run apart, as padded rows. cache: each new token runs its whole sequence again.
    tensor: tensor parallelism is refused."""

    @limits.validator
    def _known(self, attribute: object, value: Mapping[str, str]) -> None:
        if unknown := sorted(set(value) - set(LIMITS)):
            raise ValueError(f"limits: got {unknown[0]!r}, allowed: {', '.join(LIMITS)}")


@frozen(kw_only=True)
class KernelRequest:
    """Which implementation is wanted: of what operation, where, in what compute dtype."""

    operation: str  # of OPERATIONS, GENERATION or JOINED
    device: str  # "cpu" | "cuda"
    dtype: str  # "float32" | "bfloat16"
    shape: Shape
    training: bool = True
    tensor: int = 1  # tensor-parallel degree


class RowState(Protocol):
    """What one block keeps of each sequence during generation, a row a sequence."""

    def move(self, source: int, target: int) -> None:
        """Let the sequence of row `source` go on in row `target`."""
        ...


@frozen(eq=False)
class KV:
    """The keys and values of one block during generation: pages of S tokens, which sequences hold by number."""

    k_PSKH: Tensor
    v_PSKH: Tensor


@frozen(kw_only=True, eq=False)
class Paging:
    """Where the sequences of a batch have their keys and values.

    A document of the batch is then the newest part of a sequence: its last tokens, those of `lengths`.
    """

    contexts: tuple[int, ...]  # tokens of each sequence, these included, on the host; or more (see `exact`)
    contexts_D: Tensor  # [D] int32, the same on the device
    tables_DP: Tensor  # [D, P] int32: the pages of each sequence in order; beyond its context any page
    runs: tuple[int, ...]  # first page of a sequence whose pages follow each other in memory, else -1; on the host
    places_T: Tensor  # [T] int64: page * S + offset, where each token's key and value belong
    exact: bool = True  # contexts and runs are what the device holds
    """False: of a step that is recorded once and run for other sequences (CUDA graphs). Contexts are what they may be at most, runs
    are -1, each has one new token, and nothing may wait for the device."""


@frozen(kw_only=True, eq=False)
class Draws:
    """How the next token of each of B sequences is drawn from its logits of V tokens.

    At temperature 0 it is the first of the largest. Else tokens have the weights exp((logit - largest) / temperature); kept are the
    top_k likeliest, of these the fewest likeliest that have top_p of their weight, of these what
    has min_p of the largest weight. The vocabulary is cut in stretches of isqrt(V - 1) + 1 tokens: the first number of u
    chooses a stretch and the second a token in it, each by inverting the running sum of the weights that are kept.
    """

    temperature_B: Tensor  # [B] fp32
    top_k_B: Tensor  # [B] int64; V: all
    top_p_B: Tensor  # [B] fp64; 1: all
    min_p_B: Tensor  # [B] fp32; 0: all
    u_B2: Tensor  # [B, 2] fp64 in [0, 1)
    drawn: bool  # some temperature is above 0; this and the next on the host
    filtered_R: Tensor | None
    """[R] int64: rows of top_k, top_p or min_p at a temperature above 0, or where `sample.recordable` rows that may have
    them; None: there is none."""


@frozen(kw_only=True, eq=False)
class Batch:
    """Whole documents (or windows of them) laid end to end: attention never crosses their borders."""

    positions: Tensor  # [T] int64, restarting at each document
    lengths: tuple[int, ...]  # of the D documents, on the host; sums to T
    cu_seqlens: Tensor  # [D + 1] int32, running sum of lengths, on the device
    select: Tensor | None = None  # [n] int64: positions whose logits are wanted; None: all
    paging: Paging | None = None  # in generation over pages
    slots: Tensor | None = None  # [T] int64: in generation by a `CachingModule`, the row of each token's sequence
    context: int = 0  # there, decoding: longest sequence so far, this token included; 0: whole sequences, or training


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


class Module(Protocol):
    """A language model as trainer, strategies and engine see it: also a `torch.nn.Module`.

    Parameter names are the Hugging Face names. Tied means one Parameter, named as the embedding.
    """

    ops: Ops
    blocks: Sequence[torch.nn.Module]  # sharded, compiled, checkpointed one by one
    roles: Mapping[str, str]  # parameter-name pattern (fnmatch) -> "column" | "row" | "vocab"

    def __call__(
        self,
        tokens: Tensor,
        batch: Batch,
        kv: Sequence[KV] | Sequence[RowState] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """tokens [T] int64. With targets [T]: the summed loss, fp32 scalar. Else logits [n, V] of `batch.select`, in the
        compute dtype."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...


class CachingModule(Module, Protocol):
    """A module whose Shape says `own_cache`: recurrent states, the last inputs of a convolution, ..."""

    def new_cache(self, rows: int, device: str) -> Sequence[RowState]:
        """Empty state for `rows` sequences, one object a block, handed back as `kv`.

        `batch.slots` names each token's row. `batch.context == 0`: whole sequences, state is written for their last
        token. Else one token a sequence, rows 0 to B - 1 in order: state is read and written.
        """
        ...
