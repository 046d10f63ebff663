"""Checkpoints: `checkpoint-N/` with weights in Hugging Face layout, optimizer state, and where the run stood.

    config.json, model.safetensors, tokenizer files    opens like any model folder (fp32 masters)
    optimizer.safetensors                              AdamW's moments by parameter name; of several ranks, see `parts`
    state.json                                         step, position, identity of the run, random states
    manifest.json                                      size and sha256 of every file

No pickle: safetensors and JSON only. A damaged checkpoint is passed over for the newest sound one, with the reason.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from attrs import asdict, evolve, field, fields, frozen

from nanovllm_core.errors import CheckpointError, Elsewhere, OutputError
from nanovllm_core.files import (
    damage,
    described,
    discard,
    partial_of,
    read_json,
    recover,
    sync,
    writing,
    written_whole,
)  # fmt: skip
from nanovllm_core.training.parts import ALONE, Snapshot, needed, write_indexes, write_part
from nanovllm_core.training.world import World

FOLDER = re.compile(r"checkpoint-(\d+)")
FORMAT = 2
STATE = "state.json"


@frozen(kw_only=True)
class State:
    """Where a run stood."""

    step: int
    position: int  # sequences consumed
    total_steps: int  # of the schedule that was laid out
    identity: str
    tokenizer: str  # its fingerprint
    metrics: dict[str, float]  # newest held-out figures
    before: dict[str, float]  # held-out figures before the first step
    random: list[str]  # `random_state` of each rank
    evaluated: bool = True  # `metrics` are of this step; false: interrupted before its evaluation was made
    progress: dict[str, dict[str, Any]] = field(factory=dict)  # of the loop: the best evaluation, bad steps
    format: int = FORMAT


def save(
    root: Path,
    state: State,
    held: Snapshot,
    write_rest: Callable[[Path], None],
    world: World = ALONE,
    key: str = "",
) -> Path:
    """Write `root/checkpoint-<step>`; `write_rest(folder)` adds config and tokenizer. The folder's path.

    Of several ranks the first calls this, the others `save_part`, with the same `key` that no other save has; the state's
    `random` is each rank's own. Raises OutputError when it cannot be written; an older checkpoint of this step is untouched
    then.
    """
    folder = root / f"checkpoint-{state.step}"
    told: dict[str, Any] = {}
    with writing(folder), written_whole(folder, told) as partial:
        world.tell(f"{key}/begun", True)
        write_part(partial, held, world)
        random, moments = list(state.random), list(held.moments)
        for rank in range(1, world.size):
            heard = world.hear(f"{key}/{rank}")
            if "error" in heard:
                raise Elsewhere(heard["error"])
            told.update(heard["files"])
            random.append(heard["random"])
            moments += heard["moments"]
        write_indexes(partial, held.owners, moments, world.size)
        (partial / STATE).write_text(json.dumps(asdict(evolve(state, random=random)), indent=1), encoding="utf-8")
        write_rest(partial)
    return folder


def save_part(root: Path, state: State, held: Snapshot, world: World, key: str) -> None:
    """Write this rank's part of what the first rank saves. Raises OutputError, Elsewhere."""
    folder = root / f"checkpoint-{state.step}"
    world.hear(f"{key}/begun")
    try:
        with writing(folder):
            files = write_part(partial_of(folder), held, world)
            for path in files:
                sync(path)
            lines = {path.name: described(path) for path in files}
    except OutputError as e:
        world.tell(f"{key}/{world.rank}", {"error": f"rank {world.rank}: {e}"})
        raise
    told = {"files": lines, "random": state.random[0], "moments": list(held.moments)}
    world.tell(f"{key}/{world.rank}", told)


def seed_random_state(seed: int) -> None:
    """Begin torch's random state, on every device."""
    torch.manual_seed(seed)


def random_state() -> str:
    """torch's random states as text: the CPU's, and this rank's CUDA device's where CUDA is used."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if _uses_cuda() else [])]
    return " ".join(base64.b64encode(state.numpy().tobytes()).decode("ascii") for state in states)


def set_random_state(text: str) -> None:
    """Undo `random_state`; a CUDA device's part only where CUDA is used. Raises CheckpointError for what is none."""
    try:
        states = [torch.tensor(list(base64.b64decode(part, validate=True)), dtype=torch.uint8) for part in text.split()]
        torch.set_rng_state(states[0])
        if len(states) > 1 and _uses_cuda():
            torch.cuda.set_rng_state(states[1])
    except (ValueError, RuntimeError, IndexError) as e:
        raise CheckpointError(
            f"the saved random state is none of this version of torch ({str(e).splitlines()[0]}); go on with the version "
            "that saved it, or name another output_dir to begin anew"
        ) from e


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def newest(root: Path, tell: Callable[[str], None], identity: str | None = None) -> tuple[Path, State] | None:
    """The newest sound checkpoint under `root`; `tell` hears why newer ones were passed over.

    `identity`: of the run that it must belong to. First puts in order what a process killed while saving left there, so
    `root` must be this process's to write. Raises OutputError when it is not.
    """
    with writing(root):
        for left in root.glob(".checkpoint-*.gone"):
            discard(left)
        for left in list(root.glob(".checkpoint-*")):
            if FOLDER.fullmatch(name := Path(left.name[1:]).stem):
                recover(root / name)
    for _, folder in reversed(numbered(root)):
        try:
            return folder, sound(folder, identity)
        except CheckpointError as e:
            tell(f"{e}; looking for another one")
    return None


def best(root: Path, last: int) -> tuple[Path, float] | None:
    """The sound checkpoint of the lowest held-out loss, and that loss, among those of at most `last` steps."""
    losses = []
    for step, folder in numbered(root):
        try:
            state = read_state(folder)
        except CheckpointError:
            continue
        loss = state.metrics.get("eval_loss", math.nan)
        if step <= last and state.evaluated and not math.isnan(loss):
            losses.append((loss, step, folder))
    whole = ((folder, loss) for loss, _, folder in sorted(losses) if not damage(folder, [STATE, *needed(folder)]))
    return next(whole, None)


def numbered(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint by name, sound or not, in order."""
    return sorted(
        (int(m.group(1)), p)
        for p in root.glob("checkpoint-*")
        if (m := FOLDER.fullmatch(p.name)) and (p.is_symlink() or p.is_dir())
    )


def sound(folder: Path, identity: str | None) -> State:
    """The state of a checkpoint, every file of which is as it was written. Raises CheckpointError with what is wrong."""
    if reason := "is a link" if folder.is_symlink() else damage(folder, [STATE, *needed(folder)]):
        raise CheckpointError(f"{folder.name} is damaged ({reason})")
    state = read_state(folder)
    if identity is not None and state.identity != identity:
        raise CheckpointError(f"{folder.name} was saved by another run")
    return state


def read_state(folder: Path) -> State:
    """A checkpoint's `state.json`. Raises CheckpointError when it holds anything that `save` does not write."""
    try:
        if folder.is_symlink():
            raise ValueError("the folder is a link")
        data: dict[str, Any] = read_json(folder / STATE)
        if (written := data.get("format")) != FORMAT:
            raise CheckpointError(f"{folder.name} has format {str(written)[:60]}, this version reads {FORMAT}")
        for a in fields(State):
            if a.name in data and not FITS[str(a.type)](data[a.name]):
                raise ValueError(f"{a.name} is {str(data[a.name])[:60]!r}, expected {a.type}")
        state = State(**data)
        if folder.name != f"checkpoint-{state.step}":
            raise ValueError(f"step is {state.step}")
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{folder.name} is damaged ({STATE} cannot be used: {e})") from e
    return state


def _figures(value: Any) -> bool:
    """Numbers, or lists of them, by name."""
    if not isinstance(value, dict):
        return False
    return all(type(x) in (int, float) for item in value.values() for x in (item if isinstance(item, list) else [item]))


FITS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "int": lambda v: type(v) is int and 0 <= v < 1 << 63,
        "str": lambda v: isinstance(v, str),
        "bool": lambda v: isinstance(v, bool),
        "dict[str, dict[str, Any]]": lambda v: isinstance(v, dict) and all(map(_figures, v.values())),
        "dict[str, float]": lambda v: isinstance(v, dict) and all(type(x) in (int, float) for x in v.values()),
        "list[str]": lambda v: isinstance(v, list) and v != [] and all(isinstance(x, str) for x in v),
    }
)
"""Type of a field of State, as written there -> whether a value from JSON is of it."""
