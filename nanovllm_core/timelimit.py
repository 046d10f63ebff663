"""A limit on the time that a stranger's code takes in this process.

An alarm (SIGALRM) interrupts it: in the main thread, where the system has it. Elsewhere (Windows, other threads) nothing
can stop running code from outside, and there is no limit. Nor does an alarm reach C code that never comes back to the
interpreter; `nanovllm plugins --check` survives that, since it loads each component in a process of its own.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Expired(BaseException):
    """The time is up. No Exception, so that the code under the limit does not take it for an error of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Expired in the block after `seconds`, and each second again, should the block catch it.

    An alarm that someone else has set goes on afterwards with the time that it has left.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    over = False

    def expire(number: int, frame: object) -> None:
        if not over:
            raise Expired

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            over = True
    finally:
        over = True  # an alarm may have come just before the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)
