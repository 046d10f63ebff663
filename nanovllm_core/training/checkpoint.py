"""Checkpoints: `checkpoint-N/` with weights in Hugging Face layout, optimizer state, and where the run stood.

    config.json, model.safetensors, tokenizer files    opens like any model folder (fp32 masters)
    optimizer.safetensors                              AdamW's moments by parameter name
    state.json                                         step, position, identity of the run, random states
    manifest.json                                      size and sha256 of every file

No pickle: safetensors and JSON only. A damaged checkpoint is passed over for the newest sound one, with the reason.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, field, frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm_core.errors import CheckpointError
from nanovllm_core.files import damage, recover, writing, written_whole

FOLDER = re.compile(r"checkpoint-(\d+)")
FORMAT = 1


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
    random: list[str]  # torch's CPU generator state, base64, one a rank
    progress: dict[str, Any] = field(factory=dict)  # of the loop: the best evaluation, bad steps
    format: int = FORMAT


def save(
    root: Path,
    state: State,
    weights: Iterable[tuple[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    write_rest: Callable[[Path], None],
) -> Path:
    """Write `root/checkpoint-<step>`; `write_rest(folder)` adds config and tokenizer. The folder's path.

    Raises OutputError when it cannot be written; an older checkpoint of this step is untouched then.
    """
    folder = root / f"checkpoint-{state.step}"
    with writing(folder), written_whole(folder) as partial:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in weights}, partial / "model.safetensors", {"format": "pt"}
        )
        save_file(dict(_moments(optimizer, named)), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        write_rest(partial)
    return folder


def _moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}:{name}", value.detach().cpu().contiguous()


def seed_random_state(seed: int) -> None:
    """Begin torch's random state, on every device."""
    torch.manual_seed(seed)


def random_state() -> str:
    """torch's CPU random state as text."""
    return base64.b64encode(bytes(torch.get_rng_state().tolist())).decode("ascii")


def set_random_state(text: str) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8))


def newest(root: Path, tell: Callable[[str], None]) -> tuple[Path, State] | None:
    """The newest sound checkpoint under `root`; `tell` hears why newer ones were passed over.

    First puts in order what a process killed while saving left there, so `root` must be this process's to write.
    """
    for left in list(root.glob(".checkpoint-*")):
        if FOLDER.fullmatch(name := Path(left.name[1:]).stem):
            recover(root / name)
    found = [(int(m.group(1)), p) for p in root.glob("checkpoint-*") if (m := FOLDER.fullmatch(p.name)) and p.is_dir()]
    for _, folder in sorted(found, reverse=True):
        if reason := damage(folder):
            tell(f"{folder.name} is damaged ({reason}); looking for an older one")
            continue
        data: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            tell(f"{folder.name} has format {data.get('format')}, this version reads {FORMAT}; looking for another")
            continue
        return folder, State(**data)
    return None


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    trained_from: Mapping[str, int] | None = None,
) -> None:
    """Put the saved moments back, each beside its parameter. Raises CheckpointError when they do not belong to it.

    A parameter whose `trained_from` is above 0 may have none: it was frozen.
    """
    try:
        saved = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{folder / 'optimizer.safetensors'}: {e}") from e
    for name, parameter in named:
        found = {key: saved.pop(f"{key}:{name}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
        state = {}
        for key, value in found.items():
            if value is None:
                break
            state[key] = value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
        else:
            optimizer.state[parameter] = state
            continue
        if state or not (trained_from or {}).get(name):
            raise CheckpointError(f"{folder}: has no {key} of {name}; it belongs to another model")
    if saved:
        raise CheckpointError(f"{folder}: holds state of {min(saved)}, which this model does not have")
