"""A wish that a run ends: asked by a signal handler or another thread, fulfilled by the run where it can.

A run that trains finishes or abandons its step (weights untouched), saves and raises `Interrupted`; one that still reads
or tokenises has nothing to save and ends at the next report of progress.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from nanovllm_core.errors import Interrupted

T = TypeVar("T")


class StopRequest:
    """Hand it to `run(plan, stop=...)`, and call `ask` from anywhere."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.heeded = False  # the run looks by itself: whoever asks need not raise
        self.saving = False  # a checkpoint is being written because of the wish

    def ask(self) -> None:
        """Wish that the run ends."""
        self._asked.set()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raise Interrupted if the end is wished."""
        if self.asked:
            raise Interrupted("stopped as asked")

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a look before each."""
        for item in items:
            self.check()
            yield item

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Within, the run looks by itself."""
        self.heeded = True
        try:
            yield
        finally:
            self.heeded = False
