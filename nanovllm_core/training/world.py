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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from attrs import field, frozen

from nanovllm_core.contracts import Layout
from nanovllm_core.errors import Elsewhere, NanoError, TrainingError, reason
from nanovllm_core.training.launched import AGAIN, end_with_launcher, last_word, launched, orphaned, told_later
from nanovllm_core.training.meeting import LOOK, meet
from nanovllm_core.training.watch import GONE, At, Watch, said

T = TypeVar("T")
FAILED = "failed"
FOREVER = timedelta(days=20)  # torch's own limit, by the wall clock and whatever a rank is doing: the watch decides
MEETING = 600.0  # seconds in which all ranks must have come
MEETING_HERE = 120.0  # the same on one machine, where they start together
PARTING = 1.0  # seconds that the last word of a process may take


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
        """The world that torchrun describes to this process; of one process without it.

        Raises TrainingError where the description is wrong, Elsewhere where the others do not come.
        """
        told = os.environ.get("WORLD_SIZE", "1")
        made: list[World] = []
        if launched():
            end_with_launcher(lambda error: made[0].fail(error) if made else None)
        if told == "1":
            return cls()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stack traces of a store that is gone: we tell that
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        waiting = told_later(told, MEETING)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=MEETING)))
            local, count = (
                int(os.environ.get(name, default))
                for name, default in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size))
            )
            store = PrefixStore("nanovllm", store)
            store = PrefixStore(meet(store, rank, size, MEETING if size > count else MEETING_HERE), store)
        except (ValueError, RuntimeError) as e:
            if launched() and orphaned(within=1):
                raise Elsewhere(GONE, lost=True) from e
            raise TrainingError(
                f"WORLD_SIZE is {told}, and the other ranks cannot be reached ({reason(e)}); start through torchrun or with "
                "--nproc, or unset WORLD_SIZE"
            ) from e
        finally:
            waiting.cancel()
        node = range(rank - local, rank - local + count)
        watch = Watch(store, rank, size, node, hung=lambda told, answers: None)
        world = cls(rank, size, local, count, store, watch)
        made.append(world)
        watch.hung = world._hung
        with _reached():
            watch.start()
        return world

    @property
    def first(self) -> bool:
        """Whether this rank speaks and keeps the output folder."""
        return self.rank == 0

    # ------------------------------------------------------------ messages

    def tell(self, key: str, value: Any) -> None:
        """Leave a message for whoever hears `key`. A key is told once a run. Raises Elsewhere when nobody could hear it."""
        if self.size > 1:
            with _reached():
                self._store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """The message told under `key`, once it is there. Raises Elsewhere when a rank failed meanwhile."""
        with _reached():
            looked = time.monotonic()
            while not self._store.check([key]):
                self._hear_failure()
                time.sleep(LOOK)
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    self._miss_the_dead()
            return json.loads(self._store.get(key))

    def _hear_failure(self) -> None:
        """Raise Elsewhere where a rank has failed."""
        if self._store.check([FAILED]):
            raise Elsewhere(**json.loads(self._store.get(FAILED)))

    def _miss_the_dead(self) -> None:
        """Raise Elsewhere where a rank of this node is no more."""
        assert self._watch is not None
        if gone := self._watch.dead():
            self._hear_failure()  # it may have told why after the last look
            raise Elsewhere(said(gone, "is gone"), lost=True)

    def refuse_broken(self) -> None:
        """Raise Elsewhere where another rank has failed or died: a launcher ends this one then, as a user would."""
        if self.size == 1:
            return
        with _reached():
            self._hear_failure()
            self._miss_the_dead()

    def broken(self) -> bool:
        """Whether `refuse_broken` refuses."""
        try:
            self.refuse_broken()
        except Elsewhere:
            return True
        return False

    def leave_untimely(self) -> None:
        """Let the others know that this process ends in the midst of something; a store that does not answer is not waited for."""
        told = threading.Thread(target=self.fail, args=(KeyboardInterrupt(),), daemon=True)
        told.start()
        told.join(PARTING)

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
        """Let the others know that this rank cannot go on. What is no NanoError tells the user by itself: a traceback."""
        if self.size == 1:
            return
        told: dict[str, Any]
        if isinstance(error, Elsewhere):
            told = {"text": str(error), "lost": error.lost}
        elif isinstance(error, KeyboardInterrupt):
            text = "" if self.first else f"rank {self.rank} was told to stop"  # the first tells the user itself
            told = {"text": text, "lost": True}
        elif isinstance(error, NanoError):
            told = {"text": f"rank {self.rank}: {error}"}
        else:
            told = {"text": f"rank {self.rank}: {reason(error)}", "lost": True}
        with suppress(RuntimeError):
            self._store.compare_set(FAILED, "", json.dumps(told))
        if not isinstance(error, NanoError | KeyboardInterrupt):
            self.may_speak()

    def may_speak(self) -> bool:
        """Whether the user should hear of an error from this rank: only from the first that asks."""
        try:
            return self.size == 1 or self._store.add("spoken", 1) == 1
        except RuntimeError:
            return self._speaks_for_node

    @property
    def _speaks_for_node(self) -> bool:
        """Where ranks cannot agree who speaks. Without a launcher the first rank keeps the store, and may be gone with it."""
        if launched():
            return self.local_rank == 0 and not orphaned()  # which is told by itself
        return self.rank == 1

    def leave(self) -> None:
        """The run is over once the first rank has all done: it keeps the store without torchrun, and is not left unwatched."""
        if self.size > 1:
            self.from_first("over", lambda: True)
            self.tell(f"left/{self.rank}", True)
        if self.first:
            for rank in range(1, self.size):
                self.hear(f"left/{rank}")
        if self._watch is not None:
            self._watch.stop()

    # ------------------------------------------------------------ collectives

    @contextmanager
    def connected(self, device: str) -> Iterator[At]:
        """Within, torch's process group exists: gloo for CPU tensors, NCCL for those of GPUs.

        Gives what each rank must call before anything that others wait for. A rank that is stuck there for long
        (`be_patient`) ends this process; what went wrong because a rank died is raised as Elsewhere.
        """
        if self.size == 1:
            yield lambda doing, alone=False: None
            return
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        watch = self._watch
        assert watch is not None
        self.everyone("ready", True)  # a rank that has failed by now is heard of here
        watch.at("connecting")
        try:
            if device == "cuda":
                torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                store=PrefixStore("group", self._store.clone()),
                rank=self.rank,
                world_size=self.size,
                timeout=FOREVER,
            )
            watch.at("preparing the model", alone=True)
            yield watch.at
        except RuntimeError as e:
            watch.at("ending", alone=True)
            with _reached():
                self._hear_failure()
                with unsignalled():
                    gone = watch.silent()
                self._hear_failure()
            if not gone:
                raise
            raise Elsewhere(said(gone, "is gone"), lost=True) from e
        finally:
            watch.at("ending", alone=True)
        distributed.destroy_process_group()

    def _hung(self, told: str, answers: bool) -> None:
        """Called where the main thread cannot go on; `answers`: the store does."""
        if answers:
            self.fail(Elsewhere(told, lost=True))
        if self.may_speak() if answers else self._speaks_for_node:
            last_word(told)
        os._exit(AGAIN)

    def mesh(self, layout: Layout, device: str) -> Any:
        """The ranks as a mesh of data x shard x tensor; None for one rank."""
        if self.size == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        size = (layout.data, layout.shard, layout.tensor)
        return init_device_mesh(device, size, mesh_dim_names=("data", "shard", "tensor"))

    def most(self, *values: int) -> list[int]:
        """The highest of each over all ranks. All must ask, within `connected`."""
        import torch
        from torch import distributed

        table = torch.tensor(values)
        if self.size > 1:
            distributed.all_reduce(table, distributed.ReduceOp.MAX)
        return table.tolist()


@contextmanager
def _reached() -> Iterator[None]:
    """Within, the ranks' store is asked: that it is gone is told as Elsewhere."""
    try:
        yield
    except RuntimeError as e:  # of torch.distributed
        raise Elsewhere(GONE, lost=True) from e


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
