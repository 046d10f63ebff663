"""How much memory training needs on one device, before anything is built.

Derived from what the native transformer and the `torch` kernels keep; docs/memory.md has the formula, a table of its parts
and how far measurements are from it. What other kernels keep differs little; of a model that brings its own layers
(`Shape.operations` is empty) only the order of size is known: its activations are taken as `FOREIGN` times the native ones
and its logits exist all at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

from attrs import frozen

from nanovllm_core.contracts import Layout, Shape

CHUNK = MappingProxyType({"cpu": 2**21, "cuda": 2**27})  # logits that exist at once in linear_cross_entropy
ROWS = 1024  # of them, at most
WORKSPACE = MappingProxyType(
    {"cpu": 0, "cuda": 2 * 32 * 2**20}
)  # matrix library, of the forward's and the backward's thread
FOREIGN = 2.0


@frozen(kw_only=True)
class Memory:
    """Bytes by what holds them, each at its most, and how much there is at once in each moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    moments: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes at the worst moment: less than the sum of the parts, which are never all there."""
        return max(self.moments.values())


def training_memory(
    shape: Shape,
    *,
    tokens: int,
    dtype: str,
    device: str = "cpu",
    gradient_checkpointing: bool | Literal["selective"] = False,
    accumulates: bool = False,
    mixed: bool = True,
    frozen: int = 0,
    layout: Layout | None = None,
    joined: Collection[str] = (),
    masters: bool = True,
) -> Memory:
    """What training holds on one device with `tokens` tokens in a micro-batch.

    dtype: of the computation, "float32" | "bfloat16"
    accumulates: a step has several micro-batches, so a forward finds the gradients of the one before
    mixed: a micro-batch holds documents of several lengths, whose attention runs on copies
    frozen: parameters that are never trained: no gradient, no moments
    layout: `tensor` divides matrices and what they give; `shard` divides weights, gradients and moments, a block's
      weights being gathered when it runs; `data` divides nothing
    joined: operations that kernels do in one (`contracts.JOINED`)
    masters: weights, gradients and moments are fp32; else they are of the computation's dtype
    """
    layout = layout or Layout()
    s, split, t = (2 if dtype == "bfloat16" else 4), layout.tensor * layout.shard, layout.tensor
    vocabulary = shape.vocab_size * shape.hidden // t  # parameters of the embedding, or of the head
    block_parameters = max(0, shape.parameters // t - vocabulary * (1 if shape.tied else 2)) // max(1, shape.layers)
    w = 4 if masters else s
    weights, trained = w * shape.parameters // split, shape.parameters - frozen
    gradients, optimizer = w * trained // split, 2 * w * trained // split
    held = weights + optimizer + WORKSPACE.get(device, 0)
    casts = 0 if s == w else s * block_parameters  # kept for the gradient of the input
    if layout.shard > 1:
        gathered = 2 * block_parameters + vocabulary if layout.reshard else shape.parameters // t
        held += s * gathered + w * block_parameters
        casts = 0
    made = gradients  # anew in each step
    if layout.data > 1 and layout.shard == layout.tensor == 1 and not layout.ordered:
        held, made = held + gradients, 0  # in the buckets of DistributedDataParallel, which stay

    between = tokens * shape.hidden * s  # what one block hands to the next
    block = _block(shape, tokens, s, t, keeps_output=_keeps_output(s, device, mixed), again="swiglu_linear" in joined)
    block += casts
    ends = 2 * between + tokens * (8 * shape.head_dim + 40)  # final norm; cos, sin, ids, targets, positions, places
    recomputed = {True: shape.layers, False: 0, "selective": (shape.layers + 1) // 2}[gradient_checkpointing]
    blocks = recomputed * between + (shape.layers - recomputed) * block
    last_again = gradient_checkpointing is True or (gradient_checkpointing == "selective" and shape.layers % 2 == 1)
    again = block if last_again else 0  # while all others are kept: of an earlier one those behind it are gone
    down = shape.hidden * shape.intermediate // t
    back = tokens * s * (2 * shape.intermediate // t + shape.hidden) + w * down  # gradients in a block, at its widest
    loss = _loss(shape, tokens, s, device, vocabulary)

    had = made if accumulates else 0  # of earlier micro-batches
    head = w * vocabulary // layout.shard  # its gradient, which waits for the embedding's where the two are one
    waiting = head if shape.tied else 0
    before_first = had + waiting if had else max(head, made - w * block_parameters // layout.shard - head + waiting)
    moments = {
        "loss": held + had + blocks + ends + loss,
        "last block back": held + had + head + blocks + again + ends + back,
        "first block back": held + before_first + block + between + back,
        "embedding back": held + made + (head if had else 0) + 2 * waiting + between,
        "update": held + made + (0 if masters else 6 * 4 * max(vocabulary, down) // layout.shard),  # a matrix in fp32
    }
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=blocks + again + ends,
        loss=loss,
        moments=moments,
    )


def _keeps_output(size: int, device: str, mixed: bool) -> bool:
    """Whether attention keeps its output once more than the projection after it."""
    return mixed and not (size == 2 and device == "cpu")


def _block(shape: Shape, tokens: int, size: int, split: int, *, keeps_output: bool, again: bool) -> int:
    """Bytes that one block keeps for its backward, casts of weights left out.

    Input of each norm and of each matrix (the residual twice, a norm's output twice), query and key before their norm,
    then rotated, value, attention's output, and what the MLP's product is made of, the product too unless it is made `again`.
    """
    query, cache = shape.heads * shape.head_dim // split, shape.kv_heads * shape.head_dim // split
    normed = 1 if shape.qk_norm else 0
    values = 4 * shape.hidden + (2 + normed + keeps_output) * query + (2 + normed) * cache
    gated = "swiglu" in shape.operations or not shape.operations
    values += (3 - again if gated else 2) * shape.intermediate // split
    wide = 2 * shape.hidden * (4 - size) if "layer_norm" in shape.operations else 0  # its input, made fp32
    scales = 2 + ((shape.heads + shape.kv_heads) // split if normed else 0)
    log_sums = 0 if size == 2 else shape.heads // split
    kept = tokens * (values * size + wide + 4 * (scales + log_sums))
    return kept if shape.operations else int(FOREIGN * kept)


def _loss(shape: Shape, tokens: int, size: int, device: str, vocabulary: int) -> int:
    """Bytes that linear_cross_entropy holds at once: a chunk of logits, both gradients, and copies of its inputs."""
    if not shape.operations:
        return 3 * 4 * tokens * shape.vocab_size
    rows = min(tokens, ROWS, max(64, CHUNK.get(device, CHUNK["cuda"]) // shape.vocab_size))
    logits = rows * shape.vocab_size * (4 if size == 4 else 6)  # in bf16 the probabilities are fp32 beside them
    copies = 0 if size == 4 else 2 * size * vocabulary  # the matrix in bf16, and a chunk's part of its gradient
    inputs = 2 if device == "cpu" else 1  # the gradient; on a CPU the rows that are trained
    return 4 * vocabulary + logits + copies + inputs * tokens * shape.hidden * size
