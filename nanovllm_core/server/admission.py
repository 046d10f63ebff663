"""How many answers are under way: those that are made, and a queue of bounded length behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nanovllm_core.server.errors import busy


class Admission:
    """Counts answers. Touched by the event loop only."""

    def __init__(self, most: int) -> None:
        """most: answers that may be under way, the waiting ones too."""
        self.most = most
        self.under_way = 0
        self.draining = False

    @contextmanager
    def place(self, answers: int) -> Iterator[None]:
        """Room for so many answers while it is entered. Raises ApiError where there is none, or the server ends."""
        self.check(answers)
        self.under_way += answers
        try:
            yield
        finally:
            self.under_way -= answers

    def check(self, answers: int) -> None:
        """Raise ApiError where there is no room for so many answers, or the server ends."""
        if self.draining:
            raise busy("the server is ending and takes no more requests", 503, "draining", seconds=5)
        if self.under_way + answers > self.most:
            raise busy(
                f"the server is full: {self.under_way} answers are under way, allowed: {self.most}; try again later",
                429,
                "queue_full",
            )
