"""The tensors of a Hugging Face model folder, by name, one at a time.

Weights come from safetensors files alone: pickled weights (`.bin`, `.pt`, `.pth`) can run code when they are opened,
so they never are. A folder is judged when it is opened (every file that the index names is there, lies inside the
folder and holds what the index says), so that a run does not stop half-way through its weights. Reading is lazy: a
model of any size is read in the memory of its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nanovllm_core.errors import ModelError, listed, nearest
from nanovllm_core.hub import INDEX, SINGLE, inside

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
CONFIG_BYTES, INDEX_BYTES = 4 << 20, 64 << 20  # far above any real one
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)  # safetensors -> torch


class ModelFolder:
    """A model folder whose files were found sound by `open`."""

    def __init__(self, path: Path, config: dict[str, Any], files: Mapping[str, Path]) -> None:
        self.path, self.config = path, config
        self._files = files  # tensor name -> the file that holds it
        self._handles: dict[Path, Any] = {}
        self._outline = dict(self._read_outline())

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """The folder's configuration and the outline of its tensors. Raises ModelError with what is wrong."""
        folder = Path(path)
        config = read_config(folder)
        if (folder / SINGLE).is_file():
            file = inside(folder, SINGLE)
            return cls(folder, config, dict.fromkeys(_names(file), file))
        if (folder / INDEX).is_file():
            return cls(folder, config, _indexed(folder))
        pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder}: holds only pickled weights ({', '.join(pickled[:3])}), which can run code and are never "
                "loaded. Convert them where you trust them: `AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder)` writes model.safetensors"
            )
        raise ModelError(f"{folder}: no weights; expected {SINGLE}, or {INDEX} and the files that it names")

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._outline))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        self._file(name)
        return self._outline[name][0]

    @property
    def dtype(self) -> str:
        """The dtype that most of the stored values have, by torch's name."""
        values: dict[str, int] = {}
        for shape, dtype in self._outline.values():
            count = 1
            for size in shape:
                count *= size
            values[dtype] = values.get(dtype, 0) + count
        return max(values, key=lambda d: values[d], default="float32")

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU."""
        file = self._file(name)
        with _reading(file):
            tensor: Tensor = self._handle(file).get_tensor(name)
        return tensor

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise ModelError(f"{self.path}: holds no tensor {name!r}{nearest(name, self._files)}")
        return self._files[name]

    def _handle(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def _read_outline(self) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
        for name, file in self._files.items():
            with _reading(file):
                stored = self._handle(file).get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            if dtype not in DTYPES:
                raise ModelError(
                    f"{file}: tensor {name!r} is stored as {dtype}; supported: {listed(DTYPES)}. "
                    "Quantised weights cannot be used: take the original model"
                )
            yield name, (shape, DTYPES[dtype])


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder: one JSON object, at most 4 MiB, no key twice."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a model is a folder with {CONFIG} and safetensors files")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: no {CONFIG}; a model folder holds {CONFIG} and safetensors files")
    return _read_json(inside(folder, CONFIG), CONFIG_BYTES)


def _read_json(file: Path, limit: int) -> dict[str, Any]:
    size = file.stat().st_size
    if size > limit:
        raise ModelError(f"{file}: {size:,} bytes; at most {limit:,} are read")
    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file}: not sound JSON ({str(e) or type(e).__name__})") from e
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds a {type(value).__name__}, expected an object")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return seen


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _indexed(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index, checked against what the files hold."""
    index = inside(folder, INDEX)
    weight_map = _read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index}: has no weight_map from tensor names to file names")
    files = {name: inside(folder, name) for name in sorted(set(weight_map.values()))}
    held = {name: frozenset(_names(file)) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise ModelError(
                f"{files[name]}: lacks tensor {tensor!r}, which {INDEX} places there; fetch the model again"
            )
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _names(file: Path) -> Iterable[str]:
    from safetensors import safe_open

    with _reading(file), safe_open(file, framework="pt") as handle:
        return tuple(handle.keys())


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{file}: cannot be read ({e}); fetch the model again") from e
