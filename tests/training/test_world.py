"""How ranks find each other, and how often they ask whether to stop."""

import random
import threading
import time

import pytest
from torch.distributed import HashStore

from nanovllm_core.errors import Elsewhere, Interrupted
from nanovllm_core.training.meeting import meet
from nanovllm_core.training.together import Together
from nanovllm_core.training.world import World


def test_ranks_of_an_attempt_meet_whatever_earlier_ones_left():
    store, draw, names = HashStore(), random.Random(7), set()
    for _ in range(12):
        size = draw.choice([2, 3, 5])
        for rank in draw.sample(range(size), draw.randrange(size)):  # came and died before the others were there
            store.set(f"here/{rank}", f"{draw.random()}")
        found = {}

        def come(rank, late, size=size, found=found):
            time.sleep(late)
            found[rank] = meet(store, rank, size, 20)

        threads = [threading.Thread(target=come, args=(rank, draw.uniform(0, 0.1))) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1
        assert len(found) == size
        names.add(found[0])
    assert len(names) == 12


def test_a_team_waits_for_who_comes_late():
    store, found = HashStore(), {}
    store.set("here/2", "of an earlier attempt")

    def come(rank):
        found[rank] = meet(store, rank, 3, 20)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    time.sleep(0.5)
    assert not found
    threads[2].start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == 1
    assert len(found) == 3


def test_one_that_does_not_come_is_told_once():
    store, told = HashStore(), {}

    def come(rank):
        try:
            meet(store, rank, 4, 1)
        except Elsewhere as e:
            told[rank] = (str(e), e.lost)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[3] == ("", True)
    assert told[1][0].startswith("rank 0, 2 has not come within 1 s; start as many processes as WORLD_SIZE says (4)")


class Counted(World):
    """One rank that counts how often it asks the others."""

    asked = 0

    def most(self, *values):
        Counted.asked += 1
        return super().most(*values)


@pytest.mark.parametrize(("seconds", "items", "most"), [(0.3, 6, 6), (0.0005, 2000, 200)])
def test_a_wish_to_stop_is_looked_for_by_time(seconds, items, most):
    Counted.asked = 0
    wish = Together(Counted(), lambda: False)
    for _ in range(2):  # counted over steps, not anew in each
        for _ in wish.checked(range(items // 2)):
            time.sleep(seconds)
    assert (items if seconds > 0.1 else 5) <= Counted.asked <= most


def test_a_wish_to_stop_is_fulfilled():
    done = []

    def train():
        for item in Together(World(), lambda: len(done) > 200).checked(range(10**9)):
            done.append(item)

    with pytest.raises(Interrupted):
        train()
