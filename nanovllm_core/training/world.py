"""The processes of one run, and what they tell each other beside the model's own communication.

Small messages (JSON) go through the store of torchrun's rendezvous: a rank tells under a key, others hear it. Waiting
there has no time limit of its own, so a rank may tokenise for hours while the others wait; what ends a wait is the
message, or a rank that failed or is frozen. One rank speaks to the user: the first that fails, else rank 0.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from attrs import field, frozen

from nanovllm_core.contracts import Layout
from nanovllm_core.errors import Elsewhere, Interrupted, NanoError
from nanovllm_core.training.watch import Watch, said

T = TypeVar("T")
LOOK = 0.02  # seconds between two looks at the store
FAILED = "failed"
PATIENCE = 30.0  # seconds that torch waits longer than we do: it would end the process without a word
GONE = "the store that the ranks share is gone: the process that keeps it has ended"


@frozen(eq=False)
class World:
    """This process among the run's. `World()` is a run of one process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _store: Any = field(default=None, repr=False)
    _watch: Watch | None = field(default=None, repr=False)

    @classmethod
    def join(cls) -> World:
        """The world that torchrun describes to this process; of one process without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        local, count = (
            int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size))
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # messages of earlier runs are still there
        store = PrefixStore(f"nanovllm/{attempt}/{store.add(f'joined/{attempt}/{rank}', 1)}", store)
        watch = Watch(store, rank, size, range(rank - local, rank - local + count), hung=lambda told: None)
        world = cls(rank, size, local, count, store, watch)
        watch.hung = world._hung
        watch.start()
        return world

    @property
    def first(self) -> bool:
        """Whether this rank speaks and keeps the output folder."""
        return self.rank == 0

    # ------------------------------------------------------------ messages

    def tell(self, key: str, value: Any) -> None:
        """Leave a message for whoever hears `key`. A key is told once a run."""
        if self.size > 1:
            self._store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """The message told under `key`, once it is there. Raises Elsewhere when a rank failed meanwhile."""
        try:
            looked = time.monotonic()
            while not self._store.check([key]):
                if self._store.check([FAILED]):
                    raise Elsewhere(self._store.get(FAILED).decode())
                time.sleep(LOOK)
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    self._look()
            return json.loads(self._store.get(key))
        except RuntimeError as e:  # of torch.distributed
            raise Elsewhere(f"{GONE} ({str(e).splitlines()[0]})") from e

    def _look(self) -> None:
        """Raise Elsewhere where a rank that is waited for is frozen. Each waits for the first, the first for all."""
        assert self._watch is not None
        others = range(1, self.size) if self.first else (0,)
        if told := self._watch.frozen(others):
            error = Elsewhere(told)
            self.fail(error)
            raise error

    def be_patient(self, seconds: float) -> None:
        """How long a rank may hold up the others."""
        if self._watch is not None:
            self._watch.timeout = seconds

    def from_first(self, key: str, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; plain data."""
        return self._from(self.first, key, work)

    def once_a_node(self, key: str, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank of each node, on every rank of that node; plain data."""
        return self._from(self.local_rank == 0, f"{key}/{self.rank - self.local_rank}", work)

    def _from(self, mine: bool, key: str, work: Callable[[], T]) -> T:
        if not mine:
            heard: T = self.hear(key)
            return heard
        value = work()
        self.tell(key, value)
        return value

    def everyone(self, key: str, value: T) -> list[T]:
        """What each rank told under `key`, in order."""
        if self.size == 1:
            return [value]
        self.tell(f"{key}/{self.rank}", value)
        return [self.hear(f"{key}/{rank}") for rank in range(self.size)]

    def fail(self, error: BaseException) -> None:
        """Let the others know that this rank cannot go on."""
        if self.size > 1:
            text = str(error) if isinstance(error, NanoError) else f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                self._store.compare_set(
                    FAILED, "", text if isinstance(error, Elsewhere) else f"rank {self.rank}: {text}"
                )

    def may_speak(self) -> bool:
        """Whether the user should hear of an error from this rank: only from the first that asks."""
        try:
            return self.size == 1 or self._store.add("spoken", 1) == 1
        except RuntimeError:
            return self.rank == 1

    def leave(self) -> None:
        """The run is over here. The first rank waits for the others: without torchrun it keeps the store."""
        self.tell(f"left/{self.rank}", True)
        if self.first:
            for rank in range(1, self.size):
                self.hear(f"left/{rank}")
        if self._watch is not None:
            self._watch.stop()

    # ------------------------------------------------------------ collectives

    @contextmanager
    def connected(self, device: str) -> Iterator[Callable[[str], None]]:
        """Within, torch's process group exists: gloo for CPU tensors, NCCL for those of GPUs.

        Gives what each rank must call before anything that others wait for. A rank that is stuck there for long
        (`be_patient`) ends this process; what went wrong because a rank died is raised as Elsewhere.
        """
        if self.size == 1:
            yield lambda doing: None
            return
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        watch = self._watch
        assert watch is not None
        self.everyone("ready", True)  # a rank that has failed by now is heard of here
        if device == "cuda":
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=watch.timeout + PATIENCE),
        )
        try:
            yield watch.at
        except RuntimeError as e:
            watch.at("")
            with unsignalled():
                gone = watch.silent()
            if not gone:
                raise
            raise Elsewhere(said(gone, "is gone")) from e
        finally:
            watch.at("")
        distributed.destroy_process_group()

    def _hung(self, told: str) -> None:
        """Called where the main thread cannot go on."""
        self.fail(Elsewhere(told))
        if self.may_speak():
            os.write(2, f"nanovllm: {told}\n".encode())
        os._exit(2)

    def mesh(self, layout: Layout, device: str) -> Any:
        """The ranks as a mesh of data x shard x tensor; None for one rank."""
        if self.size == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        size = (layout.data, layout.shard, layout.tensor)
        return init_device_mesh(device, size, mesh_dim_names=("data", "shard", "tensor"))

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set. All ranks must ask, within `connected`."""
        if self.size == 1:
            return flag
        import torch
        from torch import distributed

        value = torch.tensor(int(flag))
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value)


@contextmanager
def unsignalled() -> Iterator[None]:
    """Within, SIGTERM is ignored: torchrun sends it as soon as one has died, and there is something to say first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Together:
    """A wish to stop that all ranks fulfil at the same place: asked before the first of some items and every 8th after."""

    EVERY = 8

    def __init__(self, world: World, asked: Callable[[], bool]) -> None:
        self.world, self.asked = world, asked

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items; all ranks must have as many. Raises Interrupted."""
        for i, item in enumerate(items):
            if i % self.EVERY == 0 and self.world.any(self.asked()):
                raise Interrupted("stopped as asked")
            yield item
