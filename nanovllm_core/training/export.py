"""The final model as a Hugging Face folder that transformers, vLLM and our own engine open unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.files import share, sync, writing

SHARD = 5_000_000_000  # bytes of weights in one file, at most


def write_config(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, dtype: str) -> None:
    """`config.json`, `generation_config.json` and the tokenizer's files.

    Ids of begin and end are the tokenizer's: those in `config` may belong to the base model's, which numbers otherwise.
    Every id that ends an answer stands in `generation_config.json`, where transformers and vLLM look for them.
    """
    begin = tokenizer.prefix_ids[0] if tokenizer.prefix_ids else None  # null: some families have an id by default
    config = {**config, "dtype": dtype, "bos_token_id": begin, "eos_token_id": tokenizer.end_id}
    pad = config.get("pad_token_id")
    if pad is not None and pad not in range(tokenizer.vocab_size):
        del config["pad_token_id"]
    stops = list(tokenizer.stop_ids)
    generation = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    if begin is not None:
        generation["bos_token_id"] = begin
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(folder)


def export(
    folder: Path, weights: Iterable[tuple[str, Tensor]], config: dict[str, Any], tokenizer: Tokenizer, dtype: str
) -> list[str]:
    """Write the model into `folder`, which may hold other things, an older export among them.

    Weights go out in `dtype` ("float32" | "bfloat16" | "float16"), in files of at most 5 GB, of which one is held in memory
    at a time. Each file is complete before it takes its name; `config.json`, without which nothing opens the folder, goes
    first and comes back last, so that a kill never leaves the parts of two models as one. The names of the files.
    Raises OutputError.
    """
    with writing(folder):
        return _export(folder, weights, config, tokenizer, dtype)


def _export(
    folder: Path, weights: Iterable[tuple[str, Tensor]], config: dict[str, Any], tokenizer: Tokenizer, dtype: str
) -> list[str]:
    partial = folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(
            partial, ((name, t.detach().to("cpu", getattr(torch, dtype)).contiguous()) for name, t in weights)
        )
        write_config(partial, config, tokenizer, dtype)
        (folder / "config.json").unlink(missing_ok=True)
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
            old.unlink()
        sync(folder)
        written = sorted(partial.iterdir(), key=lambda p: p.name == "config.json")
        for path in written:
            if path.is_file():
                share(path, partial / "config.json")
            sync(path)
            if path.is_dir():  # some tokenizers keep their chat templates in one
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        shutil.rmtree(partial, ignore_errors=True)
        sync(folder)
        return [path.name for path in written if (folder / path.name).is_file()]
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """One file, or several and their index, by Hugging Face's names."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def close() -> None:
        save_file(held, folder / f"{len(shards)}.shard", {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        if held and size + tensor.nbytes > SHARD:
            close()
            size = 0
        held[name], size, total = tensor, size + tensor.nbytes, total + tensor.nbytes
    close()
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, file in enumerate(files):
        os.replace(folder / f"{i}.shard", folder / file)
