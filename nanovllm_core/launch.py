"""`nanovllm run --nproc N`: the same command in N processes of this machine, started and watched by torchrun's own launcher."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nanovllm_core.errors import Elsewhere, RefusedError
from nanovllm_core.training.launched import AGAIN, GO_ON, ORPHAN

NO_HELP = frozenset((2, 128 + signal.SIGINT, 128 + signal.SIGTERM))
"""Exit codes of ranks whose user must mend something, or has stopped them."""
ENOUGH = 10.0  # seconds that a rank may be stopped while another has ended
LAUNCHER = "NANOVLLM_LAUNCHER"  # in a rank's environment: the process that started it


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--nproc`, `--max-restarts` and `--profile` of a command that trains."""
    add_nproc(parser)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps and a table by phase to profile/ of output_dir",
    )
    parser.add_argument(
        "--max-restarts", type=_count, default=0, metavar="N",
        help="with --nproc: start again from the newest checkpoint when a process dies or hangs, at most so often (default: 0)",
    )  # fmt: skip


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """`--nproc` of a command that plans."""
    parser.add_argument(
        "--nproc", metavar="N", help="train in N processes of this machine, or `gpu`: one on each of its GPUs"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: a number from 0")
    return int(text)


def wanted(processes: str | None, restarts: int) -> bool:
    """Whether this process is to start the ranks. Raises RefusedError; Elsewhere in a rank whose launcher is no more."""
    if processes is None:
        if restarts:
            raise RefusedError(f"--max-restarts {restarts}: it needs --nproc, which starts the processes")
        return False
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if LAUNCHER in os.environ:  # ours started it, and is its parent no longer
            raise Elsewhere(f"{ORPHAN}; {GO_ON}", lost=True)
        raise RefusedError(f"--nproc {processes}: torchrun has started the processes already; leave one of the two out")
    return True


def launch(arguments: Sequence[str], processes: str, restarts: int) -> int:
    """Run `nanovllm ARGUMENTS` as so many ranks; the exit code.

    processes: a count, or "gpu" for one a GPU
    restarts: how often all ranks are started again when one dies or hangs; the run goes on from its newest checkpoint
    """
    count = process_count(processes)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # seconds: ranks may be saving; else they leave in 9
    for again in range(restarts + 1):
        code, helps = _attempt(arguments, count)
        if not helps:
            break
        if again < restarts:
            print(f"nanovllm: starting the {count} processes again, {again + 1} of {restarts}", file=sys.stderr)
    return code


def _end_stopped(count: int, over: threading.Event) -> None:
    """End ranks that are stopped (SIGSTOP) while another has ended: neither they nor the launcher ever would."""
    complete, since = False, dict[str, float]()
    while not over.wait(1):
        children = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
        complete |= len(children) >= count
        if complete and len(children) < count:
            for pid in children:
                with suppress(OSError):
                    stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
                    first = since.setdefault(pid, time.monotonic()) if stopped else since.pop(pid, None)
                    if stopped and first is not None and time.monotonic() - first > ENOUGH:
                        os.kill(int(pid), signal.SIGKILL)


def _attempt(arguments: Sequence[str], count: int) -> tuple[int, bool]:
    """Start the ranks and wait for them: the exit code, and whether starting them again may help."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # every rank's error is told once, by us
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logs = tempfile.TemporaryDirectory(prefix="nanovllm-")  # torch's own, of which nothing is read
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # it would start again what its user must mend
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
    )
    over = threading.Event()
    if Path("/proc/self/task").is_dir():
        threading.Thread(target=_end_stopped, args=(count, over), daemon=True).start()
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "nanovllm_core.cli", *arguments)
    except ChildFailedError as e:
        rank, first = e.get_first_failure()
        if first.exitcode < 0:
            said = f"nanovllm: rank {rank} was ended by {first.signal_name()}; the same command goes on"
            print(said, file=sys.stderr)
        code = first.exitcode if first.exitcode > 0 else AGAIN
        return code, not any(failure.exitcode in NO_HELP for failure in e.failures.values())
    except SignalException as e:
        return 128 + int(e.sigval), False
    finally:
        over.set()
        logs.cleanup()
    return 0, False


def process_count(processes: str) -> int:
    """What --nproc asks for. Raises RefusedError."""
    import torch

    if processes == "gpu":
        if not torch.cuda.is_available():
            raise RefusedError("--nproc gpu: there is no GPU that torch can use here; give a number")
        return torch.cuda.device_count()
    if not (processes.isascii() and processes.isdecimal()) or int(processes) < 1:
        raise RefusedError(f"--nproc: got {processes!r}, allowed: a number from 1, or gpu")
    return int(processes)
