"""SIGINT and SIGTERM for the command line: the first asks the run to save and end, the second ends it now.

Whatever the run is doing, the process is gone within ten seconds, unless a checkpoint is being written: then it says
how to stop that too. Before the run has begun the process ends at once: an exception in the middle of an import could be
swallowed, and there is nothing to save. Nothing here is used by those who embed the core; they call `StopRequest.ask`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

from nanovllm_core.training.launched import launched
from nanovllm_core.training.stop import StopRequest
from nanovllm_core.training.world import World

GRACE = 9.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns signals into a StopRequest while it is entered (in the main thread)."""

    def __init__(self, stop: StopRequest, hint: str, world: World) -> None:
        """`hint`: how to go on, for a process that had to leave at once; `world`: of its ranks the first speaks."""
        self.stop, self.hint, self.world = stop, hint, world
        self.signal = 0
        self.begun = False  # the run: set it when the plan is made
        self._before: dict[int, Any] = {}
        self._timed = False

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        self._wakes = wakes
        self._wakeup = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="interrupt", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._wakes.close()

    @property
    def code(self) -> int:
        """The exit code by convention."""
        return 128 + (self.signal or signal.SIGINT)

    def _listen(self) -> None:
        """Hear of signals where the main thread cannot: while it waits inside a library, its handlers do not run."""
        while number := self._woken.recv(1):
            if number[0] in SIGNALS and not self._timed:
                self._timed = True
                timer = threading.Timer(GRACE, self._late, args=(number[0],))
                timer.daemon = True
                timer.start()
        self._woken.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if launched() and number == signal.SIGTERM:  # a launcher passes signals on, and they may come again
                return
            self._leave("stopped at once")
        self.signal = number
        if not self.begun:
            self._say_unless_broken("interrupted before the run began")
            self.world.leave_untimely()
            os._exit(self.code)
        self.stop.ask()
        self._say_unless_broken("stopping; once more (Ctrl-C) stops at once")
        if not self.stop.heeded:
            raise KeyboardInterrupt

    def _late(self, number: int) -> None:
        self.signal = self.signal or number
        if self.stop.saving:
            self._say("a checkpoint is being written; once more (Ctrl-C) stops at once and leaves it")
        else:
            self._leave("stopped without saving: what it was doing could not be interrupted")

    def _leave(self, why: str) -> None:
        self._say(f"{why}; {self.hint}")
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
            sys.stdout.flush()
        self.world.leave_untimely()
        os._exit(self.code)

    def _say_unless_broken(self, text: str) -> None:
        """A signal that comes because another rank has ended is no news."""
        if self.world.first and not self.world.broken():
            self._say(text)

    def _say(self, text: str) -> None:
        if self.world.first:
            os.write(2, f"nanovllm: {text}\n".encode())  # print is not safe in a signal handler
