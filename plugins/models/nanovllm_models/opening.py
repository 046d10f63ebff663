"""What an option `path` of a model names: a Hugging Face folder, a hub name, or a `.gguf` file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from nanovllm_core.hub import INDEX, SINGLE, is_gguf, resolve
from nanovllm_core.weights import CONFIG, ModelFolder, read_config
from nanovllm_models.gguf import GgufModel, read_gguf_config

Opened = ModelFolder | GgufModel


def config_of(path: str) -> dict[str, Any]:
    """The model's configuration; its weights are not asked for. Raises ModelError."""
    if is_gguf(path):
        file = Path(path).expanduser()
        return dict(_gguf_config(file, _stamp(file)))
    return read_config(resolve(path, weights=False))


def open_model(path: str) -> Opened:
    """The model's configuration and tensors; opened once as long as its files stay the same. Raises ModelError."""
    if is_gguf(path):
        file = Path(path).expanduser()
        return _gguf(file, _stamp(file))
    folder = resolve(path)
    return _folder(folder, tuple(_stamp(folder / name) for name in (CONFIG, SINGLE, INDEX)))


def _stamp(file: Path) -> tuple[int, int]:
    """Changes when the file does."""
    try:
        stat = file.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # weights are asked for one by one; headers are read once
def _folder(folder: Path, stamps: tuple[tuple[int, int], ...]) -> ModelFolder:
    return ModelFolder.open(folder)


@lru_cache(maxsize=1)  # the whole model is in memory
def _gguf(file: Path, stamp: tuple[int, int]) -> GgufModel:
    return GgufModel(file, _gguf_config(file, stamp))


@lru_cache(maxsize=4)  # reading the vocabulary beside it takes seconds
def _gguf_config(file: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    return read_gguf_config(file)
