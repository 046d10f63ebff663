"""The processes of one attempt at a run find each other in a store that may hold the words of earlier attempts.

Whoever starts ranks again after a failure may keep their store, and its agents need not agree on how often that was. So
each rank writes a name of its own, the first makes a team of the names that it reads, and the team is as good as formed
once all have answered for it: a name of a process that is no more gets no answer, until its successor writes another.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from typing import Any

from nanovllm_core.errors import Elsewhere

LOOK = 0.02  # seconds between two looks at the store


def meet(store: Any, rank: int, size: int, patience: float) -> str:
    """A name that these ranks share and no earlier attempt had. Raises Elsewhere after `patience` seconds, with an empty text
    on all of those who came but the first."""
    me, end = uuid.uuid4().hex, time.monotonic() + patience
    store.set(f"here/{rank}", me)
    while time.monotonic() < end:
        name = _gathered(store, size) if rank == 0 else _answered(store, rank, me)
        if name is not None and store.check([f"complete/{name}"]):
            return name
        time.sleep(LOOK)
    here = [other for other in range(size) if other == rank or store.check([f"here/{other}"])]
    missing = ", ".join(str(other) for other in range(size) if other not in here)
    text = f"rank {missing} has not come" if missing else "a rank has ended while the others came"
    told = f"{text} within {patience:g} s; start as many processes as WORLD_SIZE says ({size}), on nodes that reach each other"
    raise Elsewhere(told if rank == here[0] else "", lost=True)


def _gathered(store: Any, size: int) -> str | None:
    """The first rank's part: the team of all who are here, told to them; complete when each has answered."""
    places = [f"here/{rank}" for rank in range(size)]
    if not store.check(places):
        return None
    team = [name.decode() for name in store.multi_get(places)]
    name = _name(team)
    store.set("team", json.dumps(team))
    if store.check([f"answer/{name}/{rank}" for rank in range(1, size)]):
        store.set(f"complete/{name}", "")
    return name


def _answered(store: Any, rank: int, me: str) -> str | None:
    """Another rank's part: it answers for each team that has it."""
    if not store.check(["team"]):
        return None
    team = json.loads(store.get("team"))
    if rank >= len(team) or team[rank] != me:
        return None
    name = _name(team)
    store.set(f"answer/{name}/{rank}", "")
    return name


def _name(team: list[str]) -> str:
    return hashlib.sha256(" ".join(team).encode()).hexdigest()[:32]
