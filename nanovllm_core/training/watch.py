"""Who is alive and how far: each rank says so twice a second, so that one that died or hangs is named.

In a collective every rank waits for the last. A rank that waits has come as far as that one or further, so of those that
have not moved for `timeout` seconds the ones that are least far hold up the others; one that no longer even says so is gone
or frozen. Told through the ranks' store, in a thread of its own: the main thread may be the one that hangs.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen

BEAT = 0.5  # seconds between two words of a rank
SILENT = 4.0  # seconds without a word after which a rank is gone or frozen


SILENCE = "says nothing any more"


def said(doing: Mapping[int, str], what: str) -> str:
    """What is the matter with some ranks, and what each did last."""
    return "; ".join(f"rank {rank} {what}, last: {last or 'nothing yet'}" for rank, last in sorted(doing.items()))


@frozen
class Seen:
    """What a rank said last."""

    beat: int
    moves: int  # how far it has come
    doing: str
    process: int


@define(eq=False)
class Watch:
    """This rank's word from `start` on, and its eye on the others'.

    node: the ranks of this node
    hung: called from the watching thread with what is wrong when this rank has not moved for `timeout` seconds; what holds
      up the others has been ended by then, if it is on this node; also when the store is gone, and with it the run
    lonely: what is wrong then
    timeout: seconds; of a rank that says nothing, also before the run knows its own
    """

    store: Any
    rank: int
    size: int
    node: range
    hung: Callable[[str], None]
    lonely: str
    timeout: float = 60.0
    _moves: int = 0
    _doing: str = ""
    _since: float = field(factory=time.monotonic)
    _heard: dict[int, tuple[Seen, float]] = field(factory=dict)  # rank -> its last word, and when that was new
    _over: threading.Event = field(factory=threading.Event)

    def start(self) -> None:
        """Say a word twice a second from now on, for as long as the process lives or until `stop`."""
        self._say(0)  # now: what freezes at once must be known to others, with its process
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def at(self, doing: str) -> None:
        """This rank begins something that takes less than `timeout` seconds; an empty text: nothing that others wait for."""
        self._moves, self._doing, self._since = self._moves + 1, doing, time.monotonic()

    def silent(self) -> dict[int, str]:
        """Other ranks that say nothing any more, and what they did last. Takes some seconds."""
        before = {rank: seen for rank, seen in self._all().items() if rank != self.rank}
        end = time.monotonic() + SILENT
        while time.monotonic() < end:
            time.sleep(BEAT)
            now = self._all()
            before = {rank: seen for rank, seen in before.items() if now.get(rank) == seen}
        return {rank: seen.doing for rank, seen in before.items()}

    def frozen(self, ranks: Iterable[int]) -> str:
        """Who of these has said nothing new for `timeout` seconds, of calls of this; they are ended. Empty for none."""
        gone, now, seen = {}, time.monotonic(), self._all()
        for rank in ranks:
            word = seen.get(rank, Seen(0, 0, "", 0))
            before, since = self._heard.get(rank, (None, now))
            self._heard[rank] = (word, since if word == before else now)
            if word == before and now - since > self.timeout:
                gone[rank] = word.doing
                self._end(rank, word)
        return said(gone, SILENCE)

    def _end(self, rank: int, word: Seen) -> None:
        """On this node: torchrun would wait for it, and SIGTERM does nothing to what is frozen."""
        if rank in self.node and rank != self.rank and word.process:
            with suppress(OSError):
                os.kill(word.process, signal.SIGKILL)

    def _run(self) -> None:
        beat = 0
        try:
            while not self._over.wait(BEAT):
                beat += 1
                self._say(beat)
                if self._doing and time.monotonic() - self._since > self.timeout:
                    self.hung(self._told())
                    return
        except RuntimeError:  # the store is gone with the process that kept it
            if not self._over.wait(2 * SILENT):  # the main thread may be telling already
                self.hung(self.lonely)

    def _say(self, beat: int) -> None:
        self.store.set(f"beat/{self.rank}", json.dumps([beat, self._moves, self._doing, os.getpid()]))

    def _told(self) -> str:
        gone, seen = self.silent(), self._all()
        if gone:
            who = gone
            what = SILENCE
        else:
            least = min(s.moves for s in seen.values())
            who = {rank: s.doing for rank, s in seen.items() if s.moves == least}
            what = "does not go on"
        if len(who) == self.size:
            return f"no rank has gone on for {self.timeout:g} s (train.rank_timeout): {self._doing}"
        for rank in who:
            self._end(rank, seen[rank])
        return f"{said(who, what)}; the others waited {self.timeout:g} s (train.rank_timeout)"

    def _all(self) -> dict[int, Seen]:
        found = {}
        for rank in range(self.size):
            if self.store.check([f"beat/{rank}"]):
                found[rank] = Seen(*json.loads(self.store.get(f"beat/{rank}")))
        return found
