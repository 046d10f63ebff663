"""`nanovllm plugins --check`: every component loaded in a process of its own, a few at a time.

What a listing in one process cannot survive or see is a row here: a module that ends its process or crashes it, one that
hangs in C code, one that imports torch where nobody asked for it, one that writes to the terminal. The price is about
0.1 s for each component.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import EntryPoint
from typing import Any

from attrs import asdict, frozen

from nanovllm_core.errors import BrokenComponent
from nanovllm_core.installed import Entry
from nanovllm_core.registry import Registry, Row

HEAVY = ("jax", "numpy", "pandas", "scipy", "tensorflow", "tokenizers", "torch", "transformers", "triton")
GRACE = 5.0  # seconds beyond the registry's limit, for the process to start and to say that it is over the limit
CHILD = "from nanovllm_core.check import _child; _child()"


@frozen(kw_only=True)
class Checked(Row):
    """A line of `nanovllm plugins --check`."""

    seconds: float  # that loading it took
    heavy: tuple[str, ...] = ()  # heavy packages that came with it


def check(registry: Registry, entries: Sequence[Entry], jobs: int | None = None) -> list[Checked]:
    """Load each entry, at most `jobs` at a time (None: one a core, up to four)."""
    with ThreadPoolExecutor(jobs or min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda entry: _checked(registry, entry), entries))


def _checked(registry: Registry, entry: Entry) -> Checked:
    told: dict[str, Any] = {"seconds": 0.0, "heavy": ()}

    def load() -> str:
        if entry.fault or not isinstance(entry.source, EntryPoint):
            return registry.summary(entry)
        told.update(_loaded_apart(entry, registry.timeout))
        if told["broken"]:
            raise BrokenComponent(told["broken"])
        return str(told["summary"])

    row = asdict(registry.row(entry, load))
    return Checked(**row, seconds=round(told["seconds"], 3), heavy=tuple(told["heavy"]))


def _loaded_apart(entry: Entry, timeout: float) -> dict[str, Any]:
    """What the process that loads it has to tell: seconds, heavy, and a summary, or why it is broken."""
    source = {"name": entry.source.name, "value": entry.source.value, "group": entry.source.group}
    asked = json.dumps({"entry": asdict(entry) | {"source": source}, "timeout": timeout, "path": sys.path})
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as noise:  # a pipe could be held open by a child
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, asked],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=noise,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout + GRACE)
            ended = f"crashes its process ({_signal(-code)})" if code < 0 else f"ends its process (exit code {code})"
        except subprocess.TimeoutExpired:
            ended = f"does not end within {timeout:g} s, and cannot be interrupted,"
        finally:
            _kill(process)
        answer.seek(0)
        noise.seek(0)
        written, said = answer.read(), " ".join(noise.read(1 << 16).decode("utf-8", "replace").split())
    try:
        told: dict[str, Any] = json.loads(written)
    except ValueError:  # it did not come to the end
        why = f"{entry.label} from {entry.distribution} {entry.version}: {ended} when it is imported"
        return {"seconds": time.monotonic() - began, "heavy": (), "broken": why + (f": {said[-200:]}" if said else "")}
    if not told["broken"]:
        notes = [f"imports {', '.join(told['heavy'])} (that belongs inside methods)"] if told["heavy"] else []
        notes += [f"writes to the terminal when it is imported ({said[:40]!r})"] if said else []
        told["summary"] = "; ".join([*notes, told["summary"]])
    return told


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all over already
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _child() -> None:
    """What the process of one component does. Only the answer goes to what was standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    sys.path[:] = asked["path"]
    entry = Entry(**asked["entry"] | {"source": EntryPoint(**asked["entry"]["source"])})
    registry, broken, summary = Registry((entry,), asked["timeout"]), "", ""
    before, began = set(sys.modules), time.monotonic()
    try:
        summary = registry.summary(entry)
    except BrokenComponent as e:
        broken = str(e)
    seconds = time.monotonic() - began
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    told = {"seconds": seconds, "heavy": sorted(new.intersection(HEAVY)), "broken": broken, "summary": summary}
    sys.stdout.flush()
    os.write(answer, json.dumps(told).encode())
    os._exit(0)  # threads that the module started do not hold it
