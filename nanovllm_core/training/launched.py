"""What a rank and the launcher that started it have of each other: an exit code, and that the rank does not outlive it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache

from nanovllm_core.errors import Elsewhere

AGAIN = 75  # exit code of a rank that ends because another died or hangs: nothing is wrong with the recipe
LOOK = 0.5  # seconds between two looks
QUIET = 10.0  # seconds of waiting for other ranks without a word
PARENT = os.getppid()
ORPHAN = "the launcher that started the ranks has ended"
GO_ON = "the same command goes on from the newest checkpoint, if there is one"


def launched() -> bool:
    """Whether torchrun, or --nproc, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks() -> bool:
    """Whether this rank is the one of its node that says what all would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@cache
def _telling() -> tuple[threading.Lock, list[str]]:
    """Of this process: held by who tells the user why it ends, and what was told."""
    return threading.Lock(), []


def last_word(text: str) -> None:
    """Tell the user why this process ends: the first of its reasons, however many threads find one. It is told on return."""
    lock, told = _telling()
    with lock:
        if not told:
            told.append(text)
            os.write(2, f"nanovllm: {text}\n".encode())


def end_rank(code: int) -> int:
    """The code; a launched process ends with it at once, as torch's threads may abort while one that failed takes itself down."""
    if launched():
        if orphaned() and speaks():
            last_word(f"{ORPHAN}; {GO_ON}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def orphaned(within: float = 0.0) -> bool:
    """Whether the process that started this one is no more, or is so within some seconds: its sockets close before it is gone."""
    end = time.monotonic() + within
    while os.getppid() == PARENT:
        if time.monotonic() >= end:
            return False
        time.sleep(LOOK / 10)
    return True


def end_with_launcher(fail: Callable[[Elsewhere], None]) -> None:
    """From now on this process ends once the one that started it is no more; `fail` tells the other nodes."""

    _telling()  # before there are two threads that may ask for it

    def mind() -> None:
        while not orphaned():
            time.sleep(LOOK)
        if speaks():
            last_word(f"{ORPHAN}; {GO_ON}")
        # The store may not answer any more: that is not waited for.
        error = Elsewhere(f"the launcher that started rank {os.environ.get('RANK')} has ended", lost=True)
        threading.Thread(target=fail, args=(error,), daemon=True).start()
        time.sleep(LOOK)
        os._exit(AGAIN)

    threading.Thread(target=mind, name="launcher", daemon=True).start()


def told_later(size: str, patience: float) -> threading.Timer:
    """Says after some seconds that the others are waited for; of the ranks of a node one does."""
    rank, place = os.environ.get("RANK"), f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = f"nanovllm: rank {rank} waits up to {patience:g} s until all {size} ranks have come to {place}\n"
    timer = threading.Timer(QUIET, os.write, (2, text.encode()))
    timer.daemon = True
    if speaks():
        timer.start()
    return timer
