"""SIGINT and SIGTERM where nothing must be saved: a word, and the process is gone, whatever it was doing.

What is written stays as it is: whoever uses this writes so that a kill at any moment loses nothing, and unwinding would
only take time. The main thread may be inside a library, where handlers do not run; a thread then ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

GRACE = 0.3  # seconds for the main thread to hear of it
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Leaving:
    """While it is entered (in the main thread), a signal ends the process with exit code 128 + its number."""

    def __init__(self, word: Callable[[], str]) -> None:
        """`word`: what is said then."""
        self.word = word
        self._once = threading.Lock()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Leaving:
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        threading.Thread(target=self._listen, name="leaving", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._wakes.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._leave(number)

    def _listen(self) -> None:
        while number := self._woken.recv(1):
            if number[0] in SIGNALS:
                time.sleep(GRACE)
                self._leave(number[0])
        self._woken.close()

    def _leave(self, number: int) -> NoReturn:
        if self._once.acquire(blocking=False):
            start = "\n" if sys.stderr.isatty() else ""  # behind a bar that moves
            os.write(2, f"{start}nanovllm: {self.word()}\n".encode())  # print is not safe in a signal handler
            os._exit(128 + number)
        while True:  # the other thread is saying it
            time.sleep(1)
