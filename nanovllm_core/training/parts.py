"""The tensors of a checkpoint: weights and AdamW's moments, in one file each, or in one of each rank with an index.

    model.safetensors, optimizer.safetensors                                 one rank
    model-00002-of-00004.safetensors, optimizer-00002-of-00004.safetensors   what the second of four ranks wrote
    model.safetensors.index.json, optimizer.safetensors.index.json           which file holds which tensor

A file holds tensors in full, whatever the layout that they were trained in, so any other layout goes on from it. Each
rank writes its share of the parameters, about as many values as the others; none ever holds all. Reading is lazy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanovllm_core.errors import CheckpointError
from nanovllm_core.files import read_json
from nanovllm_core.training.optimizer import Optimizer
from nanovllm_core.training.sharding import local, part, spread_as, whole
from nanovllm_core.training.world import World

WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
ALONE = World()
KEYS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW's state


@frozen(eq=False)
class Snapshot:
    """Copies in host memory of what one rank writes: training may change the originals."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]  # by `key:parameter`
    owners: Mapping[str, int] = field(factory=dict)  # parameter -> the rank that writes it


def snapshot(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer, copy: bool = True, world: World = ALONE
) -> Snapshot:
    """What this rank's part of a checkpoint holds. Without `copy`, what is in host memory already is not copied.

    Parameters of several ranks are made whole one after the other, so all ranks must call this. Raises CheckpointError when
    the optimizer does not know a parameter.
    """
    parameters = dict(named)
    if lost := untrained(parameters.items(), optimizer):
        raise CheckpointError(
            f"{lost[0]} is no longer the parameter that the optimizer trains: the parallel strategy has exchanged it"
        )
    owners = owned({name: p.numel() for name, p in parameters.items()}, world.size)

    def held(name: str, tensor: Tensor) -> Iterator[Tensor]:
        full = whole(tensor.detach())
        if owners[name] == world.rank:
            yield full.to("cpu", copy=copy and full.data_ptr() == local(tensor).data_ptr()).contiguous()

    weights = {name: one for name, p in parameters.items() for one in held(name, p)}
    moments = {
        f"{key}:{name}": one
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
        for one in held(name, value)
    }
    return Snapshot(weights, moments, owners)


def untrained(named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> list[str]:
    """Names of the parameters that the optimizer does not have."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in named if id(p) not in known]


def owned(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with least so far."""
    load, owners = [0] * ranks, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def part_name(name: str, rank: int, ranks: int) -> str:
    """The file that a rank writes."""
    stem, _, suffix = name.rpartition(".")
    return name if ranks == 1 else f"{stem}-{rank + 1:05}-of-{ranks:05}.{suffix}"


def write_part(folder: Path, held: Snapshot, world: World) -> list[Path]:
    """Write this rank's files. Raises OSError, SafetensorError."""
    weights, moments = (folder / part_name(name, world.rank, world.size) for name in (WEIGHTS, MOMENTS))
    save_file(dict(held.weights), weights, {"format": "pt"})
    save_file(dict(held.moments), moments)
    return [weights, moments]


def write_indexes(folder: Path, owners: Mapping[str, int], moments: Iterable[str], ranks: int) -> None:
    """Tell which file holds which tensor, in Hugging Face's form, where there are several of a kind."""
    if ranks == 1:
        return
    places = {WEIGHTS: {name: part_name(WEIGHTS, rank, ranks) for name, rank in owners.items()}}
    places[MOMENTS] = {key: part_name(MOMENTS, owners[key.partition(":")[2]], ranks) for key in moments}
    for name, told in places.items():
        size = sum((folder / file).stat().st_size for file in set(told.values()))
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": told}, indent=1)
        (folder / index_name(name)).write_text(text, encoding="utf-8")


def index_name(name: str) -> str:
    """The index that stands for a file in parts."""
    return f"{name}.index.json"


def needed(folder: Path) -> list[str]:
    """The files of tensors that a checkpoint must have, by its indexes where it has any."""
    names = []
    for name in (WEIGHTS, MOMENTS):
        try:
            names += [index_name(name), *sorted(set(_index(folder, name).values()))]
        except FileNotFoundError:
            names.append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: whoever checks it says so
            names.append(index_name(name))
    return names


def _index(folder: Path, name: str) -> dict[str, str]:
    places = read_json(folder / index_name(name))["weight_map"]
    if not all(isinstance(file, str) for file in places.values()):
        raise ValueError("a file's name is no text")
    return dict(places)


class _Moments:
    """The moments of a checkpoint, whose files were found sound, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        try:
            if (folder / index_name(MOMENTS)).exists():
                places = _index(folder, MOMENTS)
            else:
                places = dict.fromkeys(_keys(folder / MOMENTS), MOMENTS)
            self.places = places
            self.files = {name: safe_open(folder / name, framework="pt") for name in set(places.values())}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder / MOMENTS}: {e}") from e

    def pop(self, key: str) -> Tensor | None:
        name = self.places.pop(key, None)
        if name is None:
            return None
        handle: Any = self.files[name]
        found: Tensor = handle.get_tensor(key)
        return found


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def load_optimizer(
    folder: Path,
    optimizer: Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    trained_from: Mapping[str, int] | None = None,
) -> None:
    """Put the saved moments back, each beside its parameter and spread as it is.

    Raises CheckpointError when they do not belong to it. A parameter whose `trained_from` is above 0 may have none: it was
    frozen.
    """
    saved = _Moments(folder)
    for name, parameter in named:
        state: dict[str, Tensor] = {}
        for key in KEYS:
            value = saved.pop(f"{key}:{name}")
            if value is None:
                break
            wanted, kind = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
            if value.shape != wanted or value.dtype != kind:
                raise CheckpointError(
                    f"{folder}: {key} of {name} is {list(value.shape)} in {value.dtype}, this model needs {list(wanted)} in "
                    f"{kind}; it belongs to another model"
                )
            device = local(parameter).device
            if key == "step":
                state[key] = value.clone() if device.type == "cpu" else value.to(device)
            else:
                state[key] = spread_as(parameter, part(value, parameter).to(device, copy=True).contiguous())
        else:
            optimizer.state[parameter] = state
            continue
        if state or not (trained_from or {}).get(name):
            raise CheckpointError(f"{folder}: has no {key} of {name}; it belongs to another model")
    if saved.places:
        raise CheckpointError(f"{folder}: holds state of {min(saved.places)}, which this model does not have")
