"""Who is named when ranks wait for one another: several watches in one process, each a rank, with real words between them."""

import json
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import HashStore

from nanovllm_core.training import watch as module
from nanovllm_core.training.watch import Watch


class Ranks:
    """Watches that share a store; `told[rank]` is what each was ended with. A rank's process number is none."""

    def __init__(self, monkeypatch, size, node=None, timeout=1.0, store=None):
        for name, seconds in (("BEAT", 0.05), ("SILENT", 0.6), ("BREATH", 0.3)):
            monkeypatch.setattr(module, name, seconds)
        monkeypatch.setattr(Watch, "_end", lambda self, rank, word: self.ended.append(rank))
        monkeypatch.setattr(Watch, "ended", [], raising=False)
        store, self.told, self.ranks = store or HashStore(), {}, []
        for rank in range(size):
            here = range(size) if node is None else range(rank - rank % node, rank - rank % node + node)
            hung = lambda told, answers, rank=rank: self.told.setdefault(rank, told)  # noqa: E731
            self.ranks.append(Watch(store, rank, size, here, hung, timeout))
        for rank in self.ranks:
            rank.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for rank in self.ranks:
            rank.stop()

    def wait(self, *ranks, seconds=6):
        end = time.monotonic() + seconds
        while not set(ranks) <= set(self.told) and time.monotonic() < end:
            time.sleep(0.02)
        return [self.told.get(rank, "") for rank in ranks]


def test_the_one_that_does_not_move_is_named_by_all_who_wait(monkeypatch):
    with Ranks(monkeypatch, 3) as them:
        for watch in them.ranks:
            watch.at("step 1")
        for watch in (them.ranks[0], them.ranks[2]):
            watch.at("step 1, the optimizer")
        for told in them.wait(0, 2):
            assert told == "rank 1 does not go on, last: step 1; the others waited 1 s (train.rank_timeout)"


def test_whoever_has_stopped_has_no_thread_in_the_store(monkeypatch):
    """Python that ends then would abort the process, a run that is done with it."""
    within, say = threading.Event(), Watch._say

    def slow(self, beat):
        if beat:
            within.set()
            time.sleep(0.3)
        say(self, beat)

    monkeypatch.setattr(Watch, "_say", slow)
    with Ranks(monkeypatch, 1) as them:
        assert within.wait(6)
        them.ranks[0].stop()
        assert not them.ranks[0]._talks.is_alive()


@pytest.mark.parametrize("node", [4, 2, 1])
@pytest.mark.parametrize("lost", [0, 2])
def test_one_that_says_nothing_is_noticed_while_nobody_waits_for_it(monkeypatch, node, lost):
    with Ranks(monkeypatch, 4, node=node) as them:
        for watch in them.ranks:
            watch.at("tokenising", alone=True)
        time.sleep(0.2)
        them.ranks[lost].stop()
        end = time.monotonic() + 6
        while not them.told and time.monotonic() < end:
            time.sleep(0.02)
        named = f"rank {lost} says nothing any more, last: tokenising"
        assert any(told.startswith(named) for told in them.told.values()), them.told


def test_work_of_a_rank_alone_takes_as_long_as_it_takes(monkeypatch):
    with Ranks(monkeypatch, 2) as them:
        them.ranks[0].at("saving after step 3", alone=True)
        them.ranks[1].at("saving after step 3", alone=True)
        them.ranks[1].at("step 4")
        assert them.wait(0, 1, seconds=4) == ["", ""]
        them.ranks[0].stop()  # until it is silent
        assert them.wait(1)[0].startswith("rank 0 says nothing any more, last: saving after step 3")


def test_who_goes_on_at_the_last_moment_is_let_go(monkeypatch):
    with Ranks(monkeypatch, 2) as them:
        for watch in them.ranks:
            watch.at("step 1")
        time.sleep(1.4)  # past the timeout, while it is being looked who is silent
        for watch in them.ranks:
            watch.at("step 2", alone=True)
        assert them.wait(0, 1, seconds=1.5) == ["", ""]


def test_time_in_which_this_process_did_not_run_does_not_count(monkeypatch):
    with Ranks(monkeypatch, 2, timeout=1.5) as them:
        for watch in them.ranks:
            watch.at("step 1")
        real, jump = time.monotonic, 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: real() + jump)
        time.sleep(0.5)
        for watch in them.ranks:
            watch.at("step 2", alone=True)
        time.sleep(1)
        assert not them.told


def test_process_numbers_of_another_machine_mean_nothing_here(monkeypatch):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    with Ranks(monkeypatch, 2) as them:
        them.ranks[1].stop()
        time.sleep(0.2)
        for place, dead in ((them.ranks[0]._place, {1: "step 1"}), ("elsewhere", {})):
            word = [1, 1, "step 1", False, int(gone.stdout), place]
            them.ranks[0].store.set("beat/1", json.dumps(word))
            assert them.ranks[0].dead() == dead


def test_who_has_left_is_not_missed(monkeypatch):
    with Ranks(monkeypatch, 2) as them:
        for watch in them.ranks:
            watch.at("exporting", alone=True)
        them.ranks[0].store.set("left/1", "true")
        them.ranks[1].stop()
        assert them.wait(0, seconds=3) == [""]
        assert not Watch.ended


class Mute:
    """A store that answers until it is stopped."""

    def __init__(self):
        self.store, self.stopped = HashStore(), threading.Event()

    def clone(self):
        return self

    def __getattr__(self, name):
        if self.stopped.is_set():
            threading.Event().wait(60)
        return getattr(self.store, name)


def test_a_store_that_does_not_answer_ends_who_makes_no_way(monkeypatch):
    store = Mute()
    with Ranks(monkeypatch, 2, store=store) as them:
        store.stopped.set()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            them.ranks[0].at("step")
            time.sleep(0.05)
        assert list(them.told) == [1]
        assert them.wait(0, 1) == [module.MUTE] * 2
