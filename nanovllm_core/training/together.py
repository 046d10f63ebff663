"""A wish to stop that all ranks fulfil at the same place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nanovllm_core.errors import Interrupted
from nanovllm_core.training.world import World

T = TypeVar("T")


class Together:
    """It is looked for about twice a second, at the same items on all."""

    OFTEN = 0.5  # seconds

    def __init__(self, world: World, asked: Callable[[], bool]) -> None:
        self.world, self.asked = world, asked
        self._every = self._left = 1  # items from one look to the next; of these still to come
        self._looked = -math.inf

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items; all ranks must have as many. Raises Interrupted."""
        for item in items:
            self._left -= 1
            if self._left <= 0:
                self._look()
            yield item

    def _look(self) -> None:
        """All ranks look, and agree on how many items the slowest of them will take half a second for."""
        now = time.monotonic()
        pace = (now - self._looked) / self._every  # at the first look nothing is known: look at the next item too
        wanted = min(int(self.OFTEN / max(pace, 1e-6)), 2 * self._every)  # no more than twice as many: items differ
        asked, fewer = self.world.most(int(self.asked()), -wanted)
        self._every = self._left = max(1, -fewer)
        self._looked = now
        if asked:
            raise Interrupted("stopped as asked")
