"""What the next forward reads: new tokens of running answers first, then prompts, in parts, as far as the budget goes.

First come, first served. An answer that needs a page when none is free takes back the pages of the one admitted last,
which begins again later from what it has (its tokens are kept, its pages may still be known by then). Without pages
(models that keep something else, or nothing) a sequence is read as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many

from attrs import frozen

from nanovllm_core.inference.pages import PagePool, key_of
from nanovllm_core.inference.sequence import Sequence


@frozen(eq=False)
class Part:
    """Tokens first to last - 1 of a sequence, to be read now, and after them some that are guessed."""

    sequence: Sequence
    first: int
    last: int
    guesses: Many[int] = ()

    @property
    def length(self) -> int:
        """Tokens that are read, the guessed ones included."""
        return self.last - self.first + len(self.guesses)

    @property
    def ends(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.last == len(self.sequence)


class Scheduler:
    """Sequences that wait and sequences that run."""

    def __init__(self, pool: PagePool | None, *, budget: int, most: int) -> None:
        """budget: tokens of one forward; most: sequences that run at once."""
        self.pool, self.budget, self.most = pool, budget, most
        self.guess: Callable[[Sequence, int], Many[int]] = lambda sequence, most: ()  # at most so many tokens
        self._slots = list(range(most))[::-1]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they were admitted
        self.preempted = 0  # times that a sequence was put back
        self.reused = 0  # tokens of prompts that were found in pages

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def plan(self) -> list[Part]:
        """The parts of the next forward; those of one token first. Pages for them are held."""
        parts: list[Part] = []
        left = self.budget
        before = self.preempted
        i = 0
        while i < len(self.running) and left:  # what is put back leaves from the end
            sequence = self.running[i]
            i += 1
            if sequence.full:  # it ends when its last token is seen
                continue
            last = min(len(sequence), sequence.computed + left)
            if last > sequence.computed and self._room(sequence, last, parts):
                guesses = self._guesses(sequence, left) if last == len(sequence) == sequence.computed + 1 else ()
                parts.append(Part(sequence, sequence.computed, last, guesses))
                left -= parts[-1].length
        while self.waiting and len(self.running) < self.most and left and self.preempted == before:
            part = self._admit(self.waiting[0], left, alone=not parts)
            if part is None:
                break
            self._run(self.waiting.popleft())
            parts.append(part)
            left -= part.last - part.first
        if self.pool is not None:  # without pages the order is that of the rows
            parts.sort(key=lambda part: part.length > 1)  # stable
        return parts

    def done(self, part: Part) -> None:
        """A part was read."""
        part.sequence.computed = part.last
        self.name(part.sequence)

    def name(self, sequence: Sequence) -> None:
        """Make its full pages known, as far as the tokens that they hold are."""
        if self.pool is None:
            return
        size = self.pool.size
        full = min(sequence.computed, sequence.known) // size
        for i in range(sequence.named, full):
            self.pool.name(sequence.pages[i], _key(sequence, i, size))
        sequence.named = full

    def fork(self, sequence: Sequence, like: Sequence) -> list[tuple[int, int]] | None:
        """Let a sequence that waits share the pages of one whose prompt is read, and run.

        Returns the pages to be copied, from and to: the last one, unless it is full. None, and it still waits, when there is
        no room.
        """
        pool = self.pool
        if pool is None or len(self.running) >= self.most:
            return None
        full, partial = divmod(like.computed, pool.size)
        if partial and not pool.free:
            return None
        self.waiting.remove(sequence)
        self._run(sequence)
        sequence.computed, sequence.pages = like.computed, like.pages[:full]
        sequence.keys, sequence.named = like.keys[:full], full
        for page in sequence.pages:
            pool.hold(page)
        if not partial:
            return []
        self._extend(sequence, sequence.computed)
        return [(like.pages[full], sequence.pages[-1])]

    def remove(self, sequence: Sequence) -> tuple[int, int] | None:
        """A sequence is over, or is not wanted any more.

        Without pages returns its place among those that run, and the place of the one that takes it, the last.
        """
        self._give_back(sequence)
        if sequence not in self.running:
            if sequence in self.waiting:  # else an interruption came while it was admitted
                self.waiting.remove(sequence)
            return None
        if self.pool is not None:
            self.running.remove(sequence)
            return None
        row, last = self.running.index(sequence), self.running.pop()
        if last is not sequence:
            self.running[row] = last
        return row, len(self.running)

    def _guesses(self, sequence: Sequence, left: int) -> Many[int]:
        """What may follow its newest token, as far as there is room that nobody needs."""
        pool, last = self.pool, len(sequence)
        if pool is None:
            return ()
        spare = max(0, pool.free - len(self.running))  # each of the others may want one
        here = (len(sequence.pages) + spare) * pool.size - last
        guesses = self.guess(sequence, min(left - 1, sequence.room - len(sequence.ids) - 1, here))
        self._extend(sequence, last + len(guesses))
        return guesses

    def _run(self, sequence: Sequence) -> None:
        sequence.slot = self._slots.pop()
        self.running.append(sequence)

    def forget(self) -> None:
        """Nobody waits or runs, and all pages are free: a step that ended anywhere may have left one between two hands."""
        self.waiting.clear()
        self.running.clear()
        self._slots = list(range(self.most))[::-1]
        if self.pool is not None:
            self.pool.forget()

    # ------------------------------------------------------------ pages

    def _give_back(self, sequence: Sequence) -> None:
        if self.pool is not None:
            for page in reversed(sequence.pages):  # the first is wanted longest
                self.pool.release(page)
        sequence.pages, sequence.named, sequence.computed = [], 0, 0
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1

    def _room(self, sequence: Sequence, last: int, parts: list[Part]) -> bool:
        """Hold pages up to token `last`, if need be those of sequences admitted later; False: it was put back itself."""
        if self.pool is None:
            return True
        while self.pool.needed(last) - len(sequence.pages) > self.pool.free:
            victim = self.running.pop()
            parts[:] = [part for part in parts if part.sequence is not victim]
            self._give_back(victim)
            self.waiting.appendleft(victim)
            self.preempted += 1
            if victim is sequence:
                return False
        self._extend(sequence, last)
        return True

    def _extend(self, sequence: Sequence, last: int) -> None:
        assert self.pool is not None
        while len(sequence.pages) < self.pool.needed(last):
            sequence.pages.append(self.pool.take(sequence.pages[-1] if sequence.pages else None))

    def _admit(self, sequence: Sequence, left: int, *, alone: bool) -> Part | None:
        """The first part of a sequence that waits, its pages held; None while there is no room for it."""
        pool, whole = self.pool, len(sequence)
        if sequence.like is not None and sequence.like.finish_reason is None and not sequence.like.ids:
            return None  # it will share the pages
        if pool is None:
            return Part(sequence, 0, whole) if alone or whole <= left else None
        known = self._known(sequence)
        held = sum(1 for page in known if not pool.holders(page))  # of the free ones
        if pool.needed(whole) - len(known) + held > pool.free:
            return None
        for page in known:
            pool.hold(page)
        sequence.named, sequence.pages, sequence.computed = len(known), known, len(known) * pool.size
        self.reused += sequence.computed
        last = min(whole, sequence.computed + left)
        self._extend(sequence, last)
        return Part(sequence, sequence.computed, last)

    def _known(self, sequence: Sequence) -> list[int]:
        """The pages that hold the beginning of a sequence; at least its last token is left to read."""
        assert self.pool is not None
        size, found = self.pool.size, list[int]()
        for i in range((len(sequence) - 1) // size):
            page = self.pool.find(_key(sequence, i, size))
            if page is None:
                break
            found.append(page)
        return found


def _key(sequence: Sequence, page: int, size: int) -> bytes:
    """The key of a sequence's page; each is made once, since tokens that are known stay."""
    keys = sequence.keys
    while len(keys) <= page:
        first = len(keys) * size
        keys.append(key_of(keys[-1] if keys else b"", sequence.tokens(first, first + size)))
    return keys[page]
