"""SIGINT and SIGTERM for the command line: the first asks the run to save and end, the second ends it now.

Whatever the run is doing, the process is gone within ten seconds, unless a checkpoint is being written: then it says
how to stop that too. Nothing here is used by those who embed the core; they call `StopRequest.ask`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from nanovllm_core.training.stop import StopRequest

GRACE = 9.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns signals into a StopRequest while it is entered (in the main thread)."""

    def __init__(self, stop: StopRequest, hint: str) -> None:
        """`hint`: how to go on, for a process that had to leave at once."""
        self.stop, self.hint = stop, hint
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit code by convention."""
        return 128 + (self.signal or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self._leave("stopped at once")
        self.signal = number
        self.stop.ask()
        _say("stopping; once more (Ctrl-C) stops at once")
        timer = threading.Timer(GRACE, self._late)
        timer.daemon = True
        timer.start()
        if not self.stop.heeded:
            raise KeyboardInterrupt

    def _late(self) -> None:
        if self.stop.saving:
            _say("a checkpoint is being written; once more (Ctrl-C) stops at once and leaves it")
        else:
            self._leave("stopped without saving: what it was doing could not be interrupted")

    def _leave(self, why: str) -> None:
        _say(f"{why}; {self.hint}")
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
            sys.stdout.flush()
        os._exit(self.code)


def _say(text: str) -> None:
    os.write(2, f"nanovllm: {text}\n".encode())  # print is not safe in a signal handler
