"""One engine over several ranks: the first plans, the others run the same steps on their slices of the model.

Before each step the first rank sends what is to be read, as whole numbers in one message; the model's own collectives do
the rest. Whoever runs a recorded step has all logits and the same random numbers, and so draws the same tokens; what the first rank
draws by itself it sends. The messages go over a gloo group, also where the model's go over NCCL, and a rank waits for them as
long as it takes: it ends when the first rank says so, or is gone.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor, distributed

from nanovllm_core.contracts import KV, Module, Shape
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.paged import PagedRunner, Reading
from nanovllm_core.inference.pages import PagePool
from nanovllm_core.inference.recording import ROW, Recorder

END, PAGES, RECORD, READ, STEP, PLACE, COPY = range(7)


@define(eq=False)
class Talk:
    """How the first rank speaks to the others."""

    group: Any
    torn: bool = False  # a step was begun and not ended, so nobody knows what the others wait for
    over: bool = False  # the others were let go
    stuck: bool = False  # NCCL waits for one that is gone, whatever is done
    others: list[subprocess.Popen[str]] = field(factory=list)  # of the first rank
    # What the first rank has recorded: a communicator does not end before the graphs that use it.
    recorded: list[dict[Any, Any]] = field(factory=list)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A step, which all ranks do to its end, or none hears of again. Raises GenerationError after one that was torn."""
        if self.torn or self.over:
            self.check()
            raise GenerationError(
                "the ranks of tensor_parallel_size are no more, or were interrupted in a step: close this LLM and make another"
            )
        self.torn = True
        try:
            yield
        except RuntimeError:  # a group's, perhaps, of which one is gone: its process may be about to
            deadline = time.monotonic() + 1
            while not self.lost and time.monotonic() < deadline:
                time.sleep(0.02)
            self.check()
            raise
        self.check()
        self.torn = False

    @property
    def lost(self) -> bool:
        """Whether one of the others has ended before it was let go."""
        return not self.over and any(process.poll() is not None for process in self.others)

    def check(self) -> None:
        """Raises GenerationError where a rank is lost, whatever has come of a step."""
        if self.lost:
            raise GenerationError(
                "a process of tensor_parallel_size has died (what it said stands above): close this LLM and make another"
            )


class Gone(Exception):
    """The first rank is no more."""


class LeadingRunner(PagedRunner):
    """The first rank's runner: tells the others, then does its own part."""

    def __init__(self, talk: Talk, module: Module, shape: Shape, pool: PagePool, device: str, most: int) -> None:
        super().__init__(module, shape, pool, device, most)
        self.talk = talk
        with talk.whole():
            _send(PAGES, [pool.count, pool.size, most], talk.group)

    def run(self, reading: Reading) -> Tensor:
        """As PagedRunner's."""
        with self.talk.whole():
            _send(READ, _flat(reading), self.talk.group)
            return super().run(reading)

    def place(self, slots: Many[int], tokens_B: Tensor) -> None:
        """As PagedRunner's; tokens go from device to device."""
        with self.talk.whole():
            _send(PLACE, [*slots], self.talk.group)
            distributed.broadcast(tokens_B, 0)
            super().place(slots, tokens_B)

    def copy(self, source: int, target: int) -> None:
        """As PagedRunner's."""
        with self.talk.whole():
            _send(COPY, [source, target], self.talk.group)
            super().copy(source, target)


class LeadingRecorder(Recorder):
    """The first rank's recorder. The others record the same steps and draw the same tokens, which nobody sends them."""

    def __init__(
        self, talk: Talk, module: Module, kv: Many[KV], pool: PagePool, last_N: Tensor, longest: int, vocabulary: int, device: str
    ) -> None:  # fmt: skip
        super().__init__(module, kv, pool, last_N, longest, vocabulary, device)
        self.talk = talk
        talk.recorded.append(self._recorded)
        with talk.whole():
            _send(RECORD, [longest, vocabulary], talk.group)

    def run(self, rows_BG: NDArray[np.float64], new: Many[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """As Recorder's."""
        with self.talk.whole():
            bits = rows_BG.view(np.int64).ravel().tolist()
            _send(STEP, [len(rows_BG), *bits, *itertools.chain.from_iterable(new)], self.talk.group)
            return super().run(rows_BG, new)


def say_end(group: Any) -> None:
    """Let the other ranks go."""
    _send(END, [], group)


def follow(module: Module, shape: Shape, device: str, group: Any) -> None:
    """What the other ranks do until the first lets them go. Raises Gone when it is no more."""
    runner: PagedRunner
    recorder: Recorder
    with torch.inference_mode():
        while True:
            kind, told = _receive(group)
            if kind == END:
                return
            if kind == PAGES:
                count, size, most = told
                runner = PagedRunner(module, shape, PagePool(count, size), device, most)
            elif kind == RECORD:
                longest, vocabulary = told
                recorder = Recorder(module, runner.kv, runner.pool, runner.last_N, longest, vocabulary, device)
            elif kind == READ:
                runner.run(_reading(told))
            elif kind == PLACE:
                tokens_B = torch.empty(len(told), dtype=torch.int64, device=device)
                distributed.broadcast(tokens_B, 0)
                runner.place(told, tokens_B)
            elif kind == COPY:
                runner.copy(*told)
            else:
                end = 1 + ROW * told[0]
                rows, rest = told[1:end], told[end:]
                new = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
                recorder.run(np.array(rows, dtype=np.int64).view(np.float64).reshape(-1, ROW), new)


def _flat(reading: Reading) -> list[int]:
    """As one list of numbers, each part after its size."""
    r = reading
    pages = [[len(own), *own] for own in r.pages]
    parts = (
        r.tokens,
        r.lengths,
        r.contexts,
        r.select,
        [*itertools.chain.from_iterable(r.unknown)],
        [*itertools.chain.from_iterable(pages)],
    )
    return [number for part in parts for number in (len(part), *part)]


def _reading(told: list[int]) -> Reading:
    """What `_flat` has made flat."""
    rest = iter(told)
    tokens, lengths, contexts, select, unknown, flat = ([*itertools.islice(rest, next(rest))] for _ in range(6))
    each = iter(flat)
    pages = [[*itertools.islice(each, count)] for count in each]
    return Reading(tokens, lengths, contexts, pages, select, list(zip(unknown[::2], unknown[1::2], strict=True)))


def _send(kind: int, told: list[int], group: Any) -> None:
    distributed.broadcast(torch.tensor([kind, len(told)]), 0, group=group)
    if told:
        distributed.broadcast(torch.tensor(told), 0, group=group)


def _receive(group: Any) -> tuple[int, list[int]]:
    head = torch.empty(2, dtype=torch.int64)
    try:
        distributed.broadcast(head, 0, group=group)
        kind, size = head.tolist()
        told = torch.empty(size, dtype=torch.int64)
        if size:
            distributed.broadcast(told, 0, group=group)
    except RuntimeError as e:
        raise Gone from e
    return kind, told.tolist()
