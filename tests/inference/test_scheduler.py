"""Every page is somebody's or free, and holds what its holders think: a random walk of all that can happen."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm_core.inference.pages import PagePool, key_of
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.scheduler import Scheduler
from nanovllm_core.inference.sequence import Sequence
from nanovllm_core.inference.stopping import StopTexts

STEPS = 50_000


class World:
    """A scheduler, and a memory that says which tokens each page holds, in place of a model.

    ahead: tokens become known one step after they are drawn.
    """

    def __init__(self, pages: int, size: int, budget: int, most: int, ahead: bool = False) -> None:
        self.ahead = ahead
        self.flight: list[tuple[Sequence, int]] = []
        self.unknown: dict[int, list[int]] = {}  # of a sequence, the tokens that it has drawn and nobody has told
        self.pool = PagePool(pages, size)
        self.scheduler = Scheduler(self.pool, budget=max(budget, most), most=most)
        self.memory: dict[int, tuple[int, ...]] = {}  # place -> the token there and all before it
        self.longest = pages * size
        self.answers: list[Sequence] = []
        self.seen: dict[str, int] = dict.fromkeys(("forked", "copied", "finished", "aborted"), 0)

    def ask(self, prompt: list[int], n: int, room: int) -> None:
        prompt = prompt[: self.longest - 1]
        room = min(room, self.longest - len(prompt))
        first = None
        for i in range(n):
            nothing = StopTexts(SimpleNamespace(decode=None), ())  # type: ignore[arg-type]
            sequence = Sequence(prompt, SamplingParams(seed=0), room, nothing, 0, i, first)
            first = first or sequence
            self.answers.append(sequence)
            self.scheduler.waiting.append(sequence)

    def step(self, draw: random.Random) -> None:
        if not self.scheduler.busy:
            return
        parts = self.scheduler.plan()
        assert parts or self.flight, "a step that does nothing would never end"
        assert sum(p.last - p.first for p in parts) <= self.scheduler.budget
        assert len({id(p.sequence) for p in parts}) == len(parts)
        for part in parts:
            s = part.sequence
            assert part.first == s.computed < part.last <= len(s)
            for at in range(part.first, part.last):
                page = s.pages[at // self.pool.size]
                assert self.pool.holders(page) == 1, "what is shared is never written"
                self.memory[page * self.pool.size + at % self.pool.size] = self.tokens(s)[: at + 1]
        for part in parts:
            self.scheduler.done(part)
        landing, self.flight = self.flight, []
        for part in parts:
            if part.ends:
                self.answer(part.sequence, draw)
        for flight in (landing, *(() if self.ahead else (self.flight,))):
            for s, token in flight:
                self.land(s, token, draw)
        if not self.ahead:
            self.flight = []
        held = [s.slot for s in self.scheduler.running]
        assert len(set(held)) == len(held)
        assert all(0 <= slot < self.scheduler.most for slot in held)

    def tokens(self, s: Sequence) -> tuple[int, ...]:
        return (*s.prompt, *s.ids, *self.unknown.get(id(s), ()))

    def land(self, s: Sequence, token: int, draw: random.Random) -> None:
        s.drawn -= 1
        assert self.unknown[id(s)].pop(0) == token
        if s.finish_reason is not None:
            return
        s.ids.append(token)
        self.scheduler.name(s)
        if len(s.ids) >= s.room or draw.random() < 0.03:
            s.finish_reason = "stop"
            self.leave(s, "finished")

    def answer(self, s: Sequence, draw: random.Random) -> None:
        joined = [s]
        if not s.ids and not s.drawn:
            for other in [o for o in self.scheduler.waiting if o.like is s]:
                copies = self.scheduler.fork(other, s)
                if copies is None:
                    break
                self.seen["forked"] += 1
                for source, target in copies:
                    self.seen["copied"] += 1
                    for offset in range(self.pool.size):
                        held = self.memory.get(source * self.pool.size + offset)
                        if held is not None:
                            self.memory[target * self.pool.size + offset] = held
                joined.append(other)
        for one in joined:
            token = draw.randrange(3)
            one.drawn += 1
            assert len(one.ids) + one.drawn <= one.room
            self.unknown.setdefault(id(one), []).append(token)
            self.flight.append((one, token))

    def leave(self, s: Sequence, how: str) -> None:
        s.finish_reason = s.finish_reason or "abort"
        self.scheduler.remove(s)
        self.answers.remove(s)
        self.seen[how] += 1

    def check(self) -> None:
        pool, size = self.pool, self.pool.size
        held = [0] * pool.count
        for s in self.answers:
            assert (s in self.scheduler.running) + (s in self.scheduler.waiting) == 1
            assert len(set(s.pages)) == len(s.pages)
            assert pool.needed(s.computed) <= len(s.pages)
            for page in s.pages:
                held[page] += 1
            for at in range(s.computed):
                there = self.memory[s.pages[at // size] * size + at % size]
                assert there == self.tokens(s)[: at + 1], "wrongly shared"
        assert held == [pool.holders(page) for page in range(pool.count)], "lost or leaked"
        assert pool.free == held.count(0)
        assert len(self.scheduler.running) <= self.scheduler.most
        for key, page in pool._page_of.items():
            tokens = self.memory[page * size + size - 1]
            before = b""
            for i in range(0, len(tokens), size):
                before = key_of(before, tokens[i : i + size])
            assert before == key, "a page is known by what it holds"


def prompt(draw: random.Random) -> list[int]:
    """Often one that begins like others."""
    return [
        *(0, 1, 2, 0, 1, 1, 2, 2, 0, 1, 0, 2)[: draw.randrange(13)],
        *(draw.randrange(3) for _ in range(draw.randint(1, 9))),
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_random_walk(ahead: bool) -> None:
    draw, taken, seen = (
        random.Random(2026),
        0,
        dict.fromkeys(("forked", "copied", "finished", "aborted", "preempted", "reused"), 0),
    )
    while taken < STEPS:
        world = World(
            draw.choice((8, 12, 30)), draw.choice((1, 2, 4)), draw.choice((3, 9, 40)), draw.choice((1, 3, 12)), ahead
        )
        for i in range(2500):
            act = draw.random()
            if act < 0.2 and len(world.scheduler.waiting) < 20:
                world.ask(prompt(draw), draw.choice((1, 1, 3)), draw.randint(1, 20))
            elif act < 0.23 and world.answers:
                world.leave(draw.choice(world.answers), "aborted")
            else:
                world.step(draw)
            if i % 10 == 0:
                world.check()
            taken += 1
        for name, count in world.seen.items():
            seen[name] += count
        seen["preempted"] += world.scheduler.preempted
        seen["reused"] += world.scheduler.reused
        while world.scheduler.busy:
            world.step(draw)
        world.check()
        assert world.pool.free == world.pool.count
    assert min(seen.values()) > 200, seen


class Walk(RuleBasedStateMachine):
    """The same, where hypothesis chooses and shortens what fails."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(ahead=st.booleans())
    def begin(self, ahead: bool) -> None:
        self.world = World(pages=9, size=2, budget=5, most=4, ahead=ahead)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), n=st.integers(1, 3), room=st.integers(1, 9))
    def ask(self, tokens: list[int], n: int, room: int) -> None:
        self.world.ask(tokens, n, room)

    @rule(seed=st.integers(0, 9), times=st.integers(1, 4))
    def step(self, seed: int, times: int) -> None:
        for _ in range(times):
            self.world.step(random.Random(seed))

    @precondition(lambda self: self.world.answers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.leave(data.draw(st.sampled_from(self.world.answers)), "aborted")

    @invariant()
    def all_is_well(self) -> None:
        if self.world is not None:
            self.world.check()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
