"""One engine over several ranks: the first plans and draws, the others run the same forward on their slices of the model.

Before each forward the first rank sends what is to be read, as whole numbers in one message; the model's own collectives do
the rest. The messages go over a gloo group, also where the model's go over NCCL, and a rank waits for them as long as it takes:
it ends when the first rank says so, or is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define
from torch import Tensor, distributed

from nanovllm_core.contracts import Module, Shape
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.paged import PagedRunner
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.scheduler import Part
from nanovllm_core.inference.sequence import Sequence

END, PAGES, READ, COPY = range(4)


@define(eq=False)
class Talk:
    """How the first rank speaks to the others."""

    group: Any
    torn: bool = False  # a step was begun and not ended, so nobody knows what the others wait for; or they were let go

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A step, which all ranks do to its end, or none hears of again. Raises GenerationError after one that was torn."""
        if self.torn:
            raise GenerationError(
                "the ranks of tensor_parallel_size are no more, or were interrupted in a step: close this LLM and make another"
            )
        self.torn = True
        yield
        self.torn = False


class Leading:
    """The first rank's runner: tells the others, then does its own part."""

    def __init__(self, runner: PagedRunner, talk: Talk) -> None:
        self.runner, self.talk = runner, talk

    def forward(self, parts: Many[Part]) -> Tensor:
        """The logits [n, V] after each part that reaches its sequence's end, in order."""
        with self.talk.whole():
            return self._forward(parts)

    def _forward(self, parts: Many[Part]) -> Tensor:
        told = [len(parts)]
        for part in parts:
            pages = part.sequence.pages[: self.runner.pool.needed(part.last)]
            told += [part.first, part.last, part.ends, len(pages), *pages, *part.sequence.tokens(part.first, part.last)]
        _send(READ, told, self.talk.group)
        return self.runner.forward(parts)

    def keep(self, answered: Many[Sequence], tokens_B: Tensor) -> None:
        raise AssertionError("the host knows all tokens")

    def has_kept(self, sequence: Sequence) -> bool:
        return False

    def copy(self, source: int, target: int) -> None:
        with self.talk.whole():
            _send(COPY, [source, target], self.talk.group)
            self.runner.copy(source, target)

    def left(self, row: int, last: int) -> None:
        """Nothing stands in rows here."""


def leading(runner: PagedRunner, talk: Talk) -> Leading:
    """The first rank's runner, once the others have made theirs of the same pages."""
    with talk.whole():
        _send(PAGES, [runner.pool.count, runner.pool.size], talk.group)
    return Leading(runner, talk)


def say_end(group: Any) -> None:
    """Let the other ranks go."""
    _send(END, [], group)


def follow(module: Module, shape: Shape, device: str, group: Any) -> None:
    """What the other ranks do until the first lets them go. Raises RuntimeError when it is gone."""
    kind, told = _receive(group)
    if kind == END:
        return
    runner = PagedRunner(module, shape, PagePool(*told), device)
    does: dict[int, Callable[[list[int]], None]] = {
        READ: lambda told: _read(runner, told),
        COPY: lambda told: runner.copy(*told),
    }
    with torch.inference_mode():
        while True:
            kind, told = _receive(group)
            if kind == END:
                return
            does[kind](told)


def _read(runner: PagedRunner, told: list[int]) -> None:
    count, at = told[0], 1
    tokens: list[int] = []
    select: list[int] = []
    lengths, contexts, pages = [], [], []
    for _ in range(count):
        first, last, ends, held = told[at : at + 4]
        at += 4
        pages.append(told[at : at + held])
        at += held
        tokens += told[at : at + last - first]
        at += last - first
        lengths.append(last - first)
        contexts.append(last)
        if ends:
            select.append(len(tokens) - 1)
    runner.run(tokens, lengths, contexts, pages, select)


def _send(kind: int, told: list[int], group: Any) -> None:
    distributed.broadcast(torch.tensor([kind, len(told)]), 0, group=group)
    if told:
        distributed.broadcast(torch.tensor(told), 0, group=group)


def _receive(group: Any) -> tuple[int, list[int]]:
    head = torch.empty(2, dtype=torch.int64)
    distributed.broadcast(head, 0, group=group)
    kind, size = head.tolist()
    told = torch.empty(size, dtype=torch.int64)
    if size:
        distributed.broadcast(told, 0, group=group)
    return kind, told.tolist()
