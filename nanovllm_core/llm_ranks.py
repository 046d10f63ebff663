"""The processes of `LLM(tensor_parallel_size=N)`: this one is the first rank, it starts the others and ends them.

They meet through a store of this process on the loopback address. What a rank needs to build the same model goes to its standard
input as JSON. A rank whose first rank is gone ends by itself.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Thread, current_thread
from typing import Any

from attrs import evolve

from nanovllm_core.contracts import Module, Shape
from nanovllm_core.errors import GenerationError, reason
from nanovllm_core.inference.ranks import Talk
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import ModelPlan, plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry

MEETING = timedelta(seconds=300)  # in which all ranks must have come, torch's imports included
WATCHED = 0.1  # seconds between two looks at whether the others live
ABORT = 10  # seconds in which NCCL may end what waits for a rank that is gone
FOREVER = timedelta(days=20)  # between two questions


class Ranks:
    """This rank among those that hold a model together."""

    def __init__(self, size: int, group: Any) -> None:
        """group: of their messages."""
        self.size, self.talk = size, Talk(group)
        self.end: Callable[[], object] = lambda: None

    @classmethod
    def start(cls, recipe: dict[str, Any], size: int, cores: int) -> Ranks:
        """Start the other ranks and meet them. Raises GenerationError where they do not come."""
        import torch
        from torch import distributed

        if distributed.is_initialized():
            raise GenerationError(
                "LLM: tensor_parallel_size: this process is already a rank of a process group; end that first "
                "(torch.distributed.destroy_process_group), or generate in a process of its own"
            )
        store = _store(0, size, first=True)
        threads = max(1, cores // size)
        others = []
        for rank in range(1, size):
            told = json.dumps({"recipe": recipe, "rank": rank, "size": size, "port": store.port})
            process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm_core.llm_ranks"],
                stdin=subprocess.PIPE,
                text=True,
                env=_environment(threads),
            )
            assert process.stdin is not None
            process.stdin.write(told)
            process.stdin.close()
            others.append(process)
        try:
            _meet(store, others)
            ranks = cls(size, _join(store, 0, size))
        except GenerationError:
            for process in others:
                process.kill()
                process.wait()
            raise
        before = torch.get_num_threads()
        if not torch.cuda.is_available():
            torch.set_num_threads(min(threads, before))
        ranks.talk.others = others
        watch = Thread(target=_watch, args=(ranks.talk,), name="ranks", daemon=True)
        if torch.cuda.is_available():
            watch.start()
        ranks.end = weakref.finalize(ranks, _end, ranks.talk, before, watch)
        atexit.register(_leave, ranks.end, ranks.talk)
        return ranks

    def mesh(self, device: str) -> Any:
        """The ranks as tensor slices."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device, (1, 1, self.size), mesh_dim_names=("data", "shard", "tensor"))


def planned(recipe: dict[str, Any], registry: Registry, machine: Machine) -> ModelPlan:
    """The plan of a model that only generates; over several ranks in tensor slices."""
    if machine.world_size > 1:
        recipe = {**recipe, "parallel": {"use": "tensor"}}
    return plan_model(Recipe.from_data(recipe), registry, machine, training=False)


def local_shape(shape: Shape, size: int) -> Shape:
    """What one of so many ranks holds of the heads."""
    return evolve(shape, heads=shape.heads // size, kv_heads=shape.kv_heads // size)


def _environment(threads: int) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return {
        **ours,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # a first rank that is gone is no news


def _store(port: int, size: int, *, first: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("127.0.0.1", port, size, is_master=first, timeout=MEETING, wait_for_workers=False)


def _meet(store: Any, others: list[subprocess.Popen[str]]) -> None:
    """Wait until all ranks are there. Raises GenerationError where one ends before."""
    while not store.check([_here(rank) for rank in range(1, len(others) + 1)]):
        for rank, process in enumerate(others, 1):
            if process.poll() is not None:
                raise GenerationError(
                    f"LLM: tensor_parallel_size: rank {rank} ended with code {process.returncode} before it was ready; what it "
                    "said stands above"
                )
        time.sleep(0.05)


def _here(rank: int) -> str:
    return f"rank {rank} is here"


def _join(store: Any, rank: int, size: int) -> Any:
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER)
        return distributed.new_group(backend="gloo", timeout=FOREVER)
    except RuntimeError as e:
        raise GenerationError(f"LLM: tensor_parallel_size: the {size} ranks did not meet: {e}") from e


def _watch(talk: Talk) -> None:
    """End what waits on the GPU for ranks that are gone, which NCCL would never do."""
    import torch
    from torch.distributed import distributed_c10d

    while not (talk.over or talk.lost):
        time.sleep(WATCHED)
    if talk.torn or talk.lost:
        for group in list(distributed_c10d._world.pg_map):
            with suppress(Exception):  # one that is not of NCCL
                group._get_backend(torch.device("cuda")).abort()


def _leave(end: Callable[[], object], talk: Talk) -> None:
    """When Python ends. Where NCCL does not let go of this process it would not let it end either."""
    end()
    if talk.stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _end(talk: Talk, threads: int, watch: Thread) -> None:
    """Let the other ranks go, by force where they cannot hear."""
    import torch
    from torch import distributed

    from nanovllm_core.inference.ranks import say_end

    talk.torn = talk.torn or talk.lost
    talk.over = True
    if talk.torn:
        for process in talk.others:
            process.kill()
    else:
        with suppress(Exception):
            say_end(talk.group)
    for recorded in talk.recorded:
        recorded.clear()
    for process in talk.others:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if watch.is_alive() and watch is not current_thread():
        watch.join(ABORT)
    talk.stuck = watch.is_alive() and watch is not current_thread()
    if talk.stuck:
        return
    with suppress(Exception):
        distributed.destroy_process_group()
    torch.set_num_threads(threads)


def main() -> None:
    """One of the other ranks, from its start to its end."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the first rank decides
    parent, told = os.getppid(), json.load(sys.stdin)
    rank, size = told["rank"], told["size"]
    from torch import distributed

    from nanovllm_core.assemble import assemble
    from nanovllm_core.inference.ranks import Gone, follow

    machine = evolve(Machine.detect(), world_size=size, rank=rank, local_rank=rank)
    plan = planned(told["recipe"], Registry.from_environment(), machine)
    store = _store(told["port"], size, first=False)
    store.set(_here(rank), "")
    ranks = Ranks(size, _join(store, rank, size))
    module: Module = assemble(plan, machine.device, seed=0, training=False, mesh=ranks.mesh(machine.device)).module
    try:
        follow(module, local_shape(plan.shape, size), machine.device, ranks.talk.group)
    except Gone:
        os._exit(1)
    except Exception as e:
        if os.getppid() == parent:  # else the model's own collectives have missed the first rank
            os.write(2, f"nanovllm: rank {rank} of tensor_parallel_size: {reason(e)}\n".encode())
        os._exit(1)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
