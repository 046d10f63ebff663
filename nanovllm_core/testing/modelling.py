"""A model under test, built and filled as a run does it, on the operations' definitions (`reference.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm_core.assemble import fill
from nanovllm_core.contracts import KV, Batch, Module, Ops, Shape
from nanovllm_core.hookspecs import Models
from nanovllm_core.inference.paged import paged_batch
from nanovllm_core.testing.reference import reference_ops


def build(
    models: Models,
    shape: Shape,
    ops: Ops | None = None,
    *,
    spread: float = 0.05,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Module:
    """The module on the CPU.

    `spread`: noise added to every value, so that what starts at zero or one (biases, norms, the last matrix of a block)
    takes part in the result like everything else.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        module = models.build(shape=shape, ops=ops or reference_ops())

    def weight(name: str) -> Tensor:
        value = models.weight(shape=shape, name=name, seed=seed).to(dtype)
        return value + spread * torch.randn(value.shape, generator=generator)

    fill(module, weight, "cpu")
    module.train(False)
    return module


def parameters(module: Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def pack(*lengths: int, **more: Any) -> Batch:
    """Documents of these lengths, end to end."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
    return Batch(positions=positions, lengths=lengths, cu_seqlens=ends.to(torch.int32), **more)


def draw(count: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Token ids; the vocabulary's ends are among them."""
    tokens = torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    tokens[0] = 0
    tokens[-1] = vocab_size - 1
    return tokens


def logits(module: Module, tokens: Tensor, batch: Batch, kv: Any = None) -> Tensor:
    with torch.inference_mode():
        return module(tokens, batch, kv=kv).float()


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value wanted (at least 1); infinite where one is not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


class Kept:
    """Sequences in generation, with what the model keeps of each, as the core's engine drives them."""

    kv: Sequence[Any]

    def __init__(self, module: Any, shape: Shape, sequences: Sequence[Tensor], prompts: Sequence[int]) -> None:
        self.module, self.sequences = module, sequences
        self.active, self.sizes = list(range(len(sequences))), list(prompts)

    @staticmethod
    def of(module: Any, shape: Shape, sequences: Sequence[Tensor], prompts: Sequence[int]) -> Kept:
        """In rows where the module keeps its own state, else in pages."""
        return (Rows if shape.own_cache else Pages)(module, shape, sequences, prompts)

    def read(self, first: int, last: int) -> Tensor:
        """Read prompts `first` to `last` - 1; the logits after the last token of each."""
        raise NotImplementedError

    def decode(self) -> Tensor:
        """One more token for each active sequence; the logits after it."""
        raise NotImplementedError

    def finish(self, row: int) -> None:
        """The row-th active sequence is over; the last takes its place."""
        last = self.active.pop()
        if row < len(self.active):
            self.active[row] = last


class Pages(Kept):
    """Of three tokens each, those of the sequences taking turns in memory."""

    SIZE = 3

    def __init__(self, module: Any, shape: Shape, sequences: Sequence[Tensor], prompts: Sequence[int]) -> None:
        super().__init__(module, shape, sequences, prompts)
        most = -(-max(map(len, sequences)) // self.SIZE)
        self.pages = [list(range(1 + i, 1 + most * len(sequences), len(sequences))) for i in range(len(sequences))]
        size = (1 + most * len(sequences), self.SIZE, shape.kv_heads, shape.head_dim)
        self.kv = [KV(torch.zeros(size), torch.zeros(size)) for _ in module.blocks]

    def read(self, first: int, last: int) -> Tensor:
        return self._run(range(first, last), [self.sizes[i] for i in range(first, last)])

    def decode(self) -> Tensor:
        for i in self.active:
            self.sizes[i] += 1
        return self._run(self.active, [1] * len(self.active))

    def _run(self, which: Sequence[int], new: Sequence[int]) -> Tensor:
        select = (torch.tensor(new).cumsum(0) - 1).tolist()
        contexts = [self.sizes[i] for i in which]
        batch = paged_batch(new, contexts, [self.pages[i] for i in which], self.SIZE, select)
        tokens = [self.sequences[i][c - n : c] for i, c, n in zip(which, contexts, new, strict=True)]
        return logits(self.module, torch.cat(tokens), batch, self.kv)


class Rows(Kept):
    """Entry i of `active` stands in row i."""

    def __init__(self, module: Any, shape: Shape, sequences: Sequence[Tensor], prompts: Sequence[int]) -> None:
        super().__init__(module, shape, sequences, prompts)
        self.kv = module.new_cache(len(sequences), "cpu")

    def read(self, first: int, last: int) -> Tensor:
        """Prefill rows; the logits after the last token of each."""
        lengths = torch.tensor(self.sizes[first:last])
        slots = torch.arange(first, last).repeat_interleave(lengths)
        batch = pack(*lengths.tolist(), select=lengths.cumsum(0) - 1, slots=slots)
        tokens = torch.cat([self.sequences[i][: self.sizes[i]] for i in range(first, last)])
        return logits(self.module, tokens, batch, self.kv)

    def decode(self) -> Tensor:
        """One more token for each active sequence; the logits after it."""
        sizes = torch.tensor([self.sizes[i] for i in self.active])
        rows = len(self.active)
        batch = Batch(
            positions=sizes.clone(),
            lengths=(1,) * rows,
            cu_seqlens=torch.arange(rows + 1, dtype=torch.int32),
            slots=torch.arange(rows),
            context=int(sizes.max()) + 1,
        )
        tokens = torch.stack([self.sequences[i][self.sizes[i]] for i in self.active])
        for i in self.active:
            self.sizes[i] += 1
        return logits(self.module, tokens, batch, self.kv)

    def finish(self, row: int) -> None:
        super().finish(row)
        if row < len(self.active):
            for cache in self.kv:
                cache.move(len(self.active), row)
