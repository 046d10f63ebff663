"""Who is alive and how far: each rank says so twice a second, so that one that died or hangs is named.

In a collective every rank waits for the last. A rank that waits has come as far as that one or further, so of those that
have not moved for `timeout` seconds the ones that are least far hold up the others; one that no longer even says so is gone
or frozen. What a rank does alone, as writing to a disk, takes as long as it takes while the rank still speaks.

Two threads, since the main one may be what hangs: one speaks through the ranks' store and looks at the others, one counts
the time and notices that the store no longer answers. Time in which this process did not run does not count: ranks that
were suspended together go on together.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from attrs import define, field, frozen

BEAT = 0.5  # seconds between two words of a rank
SILENT = 4.0  # seconds without a word after which a rank is gone or frozen
BREATH = 2.0  # seconds that count at most between two beats: in the rest this process did not run

SILENCE = "says nothing any more"
GONE = "the store that the ranks share is gone: the process that keeps it (the launcher, or rank 0) has ended"
MUTE = "the store that the ranks share does not answer: the process that keeps it (the launcher, or rank 0) is stopped"


class At(Protocol):
    """Told what this rank begins: something that takes less than the timeout, or, `alone`, what it does without others."""

    def __call__(self, doing: str, alone: bool = False) -> None: ...


def said(doing: Mapping[int, str], what: str) -> str:
    """What is the matter with some ranks, and what each did last."""
    return "; ".join(f"rank {rank} {what}, last: {last or 'nothing yet'}" for rank, last in sorted(doing.items()))


@frozen
class Word:
    """What a rank said last."""

    beat: int = 0
    moves: int = 0  # how far it has come
    doing: str = ""
    alone: bool = True
    process: int = 0
    place: str = ""  # where that number means this process


@define(eq=False)
class Watch:
    """This rank's word from `start` on, and its eye on the others'.

    node: the ranks of this node
    hung: called from a thread of the watch with what is wrong, and whether the store answers: the run cannot go on, and this
      ends the process. What holds up the others has been ended by then, if it is on this node
    timeout: seconds that a rank may hold up the others or say nothing; also before the run knows its own
    """

    store: Any
    rank: int
    size: int
    node: range
    hung: Callable[[str, bool], None]
    timeout: float = 60.0
    _clock: float = 0.0  # seconds in which this process ran
    _moves: int = 0
    _doing: str = ""
    _alone: bool = True
    _since: float = 0.0  # when it began that
    _answered: float = 0.0  # when the store last did
    _heard: dict[int, tuple[Word, float]] = field(factory=dict)  # rank -> its last word, and when that was new
    _over: threading.Event = field(factory=threading.Event)
    _talks: threading.Thread | None = None
    _place: str = field(factory=lambda: _place())

    def start(self) -> None:
        """Say a word twice a second from now on, for as long as the process lives or until `stop`."""
        self.store = self.store.clone()  # what another thread waits for must not hold up a word
        threading.Thread(target=self._count, name="watch-time", daemon=True).start()
        self._say(0)  # now: what freezes at once must be known to others, with its process
        self._talks = threading.Thread(target=self._talk, name="watch", daemon=True)
        self._talks.start()

    def stop(self) -> None:
        """The last word is said on return: Python that ends while a thread is in torch's store aborts the process."""
        self._over.set()
        if self._talks is not None:
            self._talks.join(SILENT)

    def at(self, doing: str, alone: bool = False) -> None:
        """This rank begins something, see At."""
        self._moves, self._doing, self._alone, self._since = self._moves + 1, doing, alone, self._clock

    def silent(self) -> dict[int, str]:
        """Other ranks that say nothing any more, and what they did last. Takes some seconds where none of this node is dead."""
        if dead := self.dead():
            return dead
        end = time.monotonic() + SILENT + 3 * BEAT
        gone = self._unheard(self._others(), SILENT)
        while time.monotonic() < end:
            time.sleep(BEAT)
            gone = self._unheard(self._others(), SILENT)
        return {rank: word.doing for rank, word in gone.items()}

    def dead(self) -> dict[int, str]:
        """Ranks of this node (and machine) whose process is no more though they have not left, and what they did last."""
        words = {rank: self._word(rank) for rank in self.node if rank != self.rank}
        return {
            rank: word.doing
            for rank, word in words.items()
            if word is not None and word.place == self._place and _gone(word.process)
        }

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # ------------------------------------------------------------ threads

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            self._clock, last = self._clock + min(now - last, BREATH), now
            if self._clock - max(self._answered, self._since) > self.timeout + 2 * SILENT:
                self.hung(MUTE, False)

    def _talk(self) -> None:
        beat = 0
        try:
            while not self._over.wait(BEAT):
                beat += 1
                self._say(beat)
                self._look()
        except RuntimeError:  # the store is gone with the process that kept it
            if not self._over.wait(2 * SILENT):  # the main thread may be telling already
                self.hung(GONE, False)

    def _look(self) -> None:
        """End the run where it cannot go on: a rank is frozen, or holds this one up."""
        if gone := self._unheard(self._watched(), self.timeout):
            self._give_up(gone, SILENCE)
        moves, waited = self._moves, self._clock - self._since
        if self._alone or waited < self.timeout:
            return
        gone = self._unheard(self._others(), SILENT)
        if waited < self.timeout + SILENT + 2 * BEAT:
            return  # not looked for long enough
        who = gone or self._least_far()
        at_work = not gone and any(word.alone for word in who.values())
        if not at_work and moves == self._moves and not self._over.is_set():
            self._give_up(who, SILENCE if gone else "does not go on")

    def _give_up(self, who: Mapping[int, Word], what: str) -> None:
        if len(who) == self.size:
            told = f"no rank has gone on for {self.timeout:g} s: {self._doing}"
        else:
            told = (
                f"{said({rank: word.doing for rank, word in who.items()}, what)}; the others waited {self.timeout:g} s"
            )
        for rank, word in who.items():
            self._end(rank, word)
        self.hung(f"{told} (train.rank_timeout)", True)

    def _watched(self) -> set[int]:
        """Whom this rank keeps an eye on: the next of its node, and the first of each node the next node's first."""
        here = self.node
        eye = {here[(self.rank - here.start + 1) % len(here)]}
        if self.rank == here.start:
            eye.add(here.stop % self.size)
        return eye - {self.rank}

    def _least_far(self) -> dict[int, Word]:
        words = {rank: word for rank in range(self.size) if (word := self._word(rank)) is not None}
        least = min(word.moves for word in words.values())
        return {rank: word for rank, word in words.items() if word.moves == least}

    # ------------------------------------------------------------ words

    def _say(self, beat: int) -> None:
        word = [beat, self._moves, self._doing, self._alone, os.getpid(), self._place]
        self.store.set(f"beat/{self.rank}", json.dumps(word))
        self.store.check([f"beat/{self.rank}"])
        self._answered = self._clock

    def _word(self, rank: int) -> Word | None:
        """What a rank said last; None of one that has left."""
        if self.store.check([f"left/{rank}"]):
            return None
        return Word(*json.loads(self.store.get(key))) if self.store.check([key := f"beat/{rank}"]) else Word()

    def _unheard(self, ranks: Iterable[int], seconds: float) -> dict[int, Word]:
        """Those of whom these calls have heard nothing new for so long."""
        gone, now = {}, self._clock
        for rank in ranks:
            word = self._word(rank)
            if word is None:
                continue
            before, since = self._heard.get(rank, (None, now))
            self._heard[rank] = (word, since if word == before else now)
            if word == before and now - since > seconds:
                gone[rank] = word
        return gone

    def _end(self, rank: int, word: Word) -> None:
        """On this machine: torchrun would wait for it, and SIGTERM does nothing to what is frozen."""
        if rank != self.rank and word.place == self._place:
            with suppress(OSError):
                os.kill(word.process, signal.SIGKILL)


def _place() -> str:
    """This machine, and on it the space of process numbers: containers have their own."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _gone(process: int) -> bool:
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"  # dead, and its parent has not looked yet
    except ProcessLookupError:
        return True
    except OSError:  # not Linux, or someone else's
        return False
