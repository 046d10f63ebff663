"""`nanovllm run --nproc N`: the same command in N processes of this machine, started and watched by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from nanovllm_core.errors import RefusedError


def launch(arguments: Sequence[str], processes: str, restarts: int) -> int:
    """Run `nanovllm ARGUMENTS` as so many ranks; the exit code.

    processes: a count, or "gpu" for one a GPU
    restarts: how often all ranks are started again when one fails; the run goes on from its newest checkpoint
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = _count(processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        monitor_interval=0.5,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # every rank's error is told once, by us
    try:
        elastic_launch(config, sys.executable)("-m", "nanovllm_core.cli", *arguments)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"nanovllm: rank {rank} was ended by {failure.signal_name()}; the same command goes on", file=sys.stderr
            )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as e:
        return 128 + int(e.sigval)
    return 0


def _count(processes: str) -> int:
    import torch

    if processes == "gpu":
        if not torch.cuda.is_available():
            raise RefusedError("--nproc gpu: there is no GPU that torch can use here; give a number")
        return torch.cuda.device_count()
    if not processes.isdigit() or int(processes) < 1:
        raise RefusedError(f"--nproc: got {processes!r}, allowed: a number from 1, or gpu")
    return int(processes)
