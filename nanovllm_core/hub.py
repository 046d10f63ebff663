"""From a model's name to a local folder: a folder is itself, a hub name resolves through the Hugging Face cache.

Only what a model folder needs is fetched; code and pickled weights never are.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from nanovllm_core.errors import ModelError
from nanovllm_core.files import digest

CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_FILES = ("*.safetensors",)
TOKENIZER_FILES = ("*token*.json", "generation_config.json", "vocab.*", "merges.txt", "*.jinja", "*.model")
SIZED = re.compile(r"(.*-)(\d+(?:\.\d+)?)([BM])")
KNOWN = (  # families that people misremember the sizes of
    *(f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")),
    *(f"Qwen/Qwen2.5-{size}B" for size in ("0.5", "1.5", "3", "7", "14", "32", "72")),
    "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-1.7B",
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_gguf(name: str) -> bool:
    """Whether `name` is a GGUF file: one file that holds configuration, weights and tokenizer."""
    return name.lower().endswith(".gguf") and Path(name).expanduser().is_file()


def resolve(name: str, *, weights: bool = True) -> Path:
    """The folder of a model: `name` is a folder, or a hub name such as `Qwen/Qwen3-0.6B`.

    The Hugging Face cache (`HF_HOME`, `HF_HUB_CACHE`) is looked in first, so that offline machines work; then the hub
    (`HF_TOKEN` opens gated models). Raises ModelError when the name is neither.
    """
    if not name.strip():
        raise ModelError(f"a model's name is empty ({name!r}); give its folder or its hub name")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(
            f"{name}: is a file; a model is named by its folder (with config.json), a .gguf file or its hub name"
        )
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        cached = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if not _lacking(cached, weights):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as e:
        raise ModelError(f"{name}: neither a folder here nor a valid hub name ({e})") from e
    try:
        fetched = Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        said = (
            _nearest(name)
            or f". Fetch it on a connected machine with `hf download {name}`, or name a folder with the model"
        )
        raise ModelError(
            f"{name}: not a folder here, not in the Hugging Face cache, and the hub did not give it ({reason}){said}"
        ) from e
    if lacking := _lacking(fetched, weights):
        raise ModelError(
            f"{name}: {fetched} holds no {lacking}; fetch it whole on a connected machine with `hf download {name}`, "
            "or name another model"
        )
    return fetched


def _nearest(name: str) -> str:
    """The models of a known family whose size is nearest to one that its family does not have; empty for others."""
    found = SIZED.fullmatch(name)
    if found is None or name in KNOWN:
        return ""
    sizes = {k: float(m[2]) for k in KNOWN if (m := SIZED.fullmatch(k)) and m[1] == found[1] and m[3] == found[3]}
    order = sorted(sizes, key=lambda k: abs(math.log(sizes[k] / float(found[2])))) if float(found[2]) else []
    return f"; its family has no such size, the nearest are {' and '.join(order[:2])}" if order else ""


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Links may lead to other files of the folder, or to the blobs of a Hugging Face cache."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise ModelError(f"{folder}: {INDEX} names {name!r}, which is not a plain file name; nothing outside is read")
    file = folder / name
    if not file.is_file():
        what = "is no file" if file.exists() else "is missing"
        raise ModelError(f"{folder}: {name} {what}; fetch the model again")
    root, real = folder.resolve(), file.resolve()
    cache = next((p.parent / "blobs" for p in (root.parent, root.parent.parent) if p.name == "snapshots"), None)
    if real.parent not in (root, cache):
        raise ModelError(f"{file}: is a link out of the model's folder; copy the file there instead")
    return file


def fingerprint(name: str, *, weights: bool, progress: Callable[[int, int], None] | None = None) -> str:
    """sha256 over a model's files (`weights`), or a tokenizer's: two names of one content have one fingerprint."""
    path = Path(name).expanduser()
    folder = None if path.is_file() else resolve(name, weights=weights)
    wanted = ("config.json", *WEIGHT_FILES) if weights else TOKENIZER_FILES
    names = sorted({p.name for pattern in wanted for p in folder.glob(pattern)}) if folder else []
    files = [inside(folder, name) for name in names] if folder else [path]
    done, total = 0, sum(p.stat().st_size for p in files)
    whole = hashlib.sha256()
    if progress is not None:
        progress(0, total)
    for file in files:
        whole.update(f"{file.name}\0{digest(file)}\n".encode())
        done += file.stat().st_size
        if progress is not None:
            progress(done, total)
    return whole.hexdigest()


def _lacking(folder: Path, weights: bool) -> str:
    """What a cached folder does not hold of what is wanted, as after an interrupted download; empty when it is whole."""
    if not any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return "model or tokenizer"
    if not weights or (folder / SINGLE).is_file():
        return ""
    if not (folder / INDEX).is_file():
        return "safetensors weights"
    try:
        named = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        absent = [name for name in named if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"readable {INDEX}"
    return f"{absent[0]} ({len(absent)} of the {len(named)} files that {INDEX} names are missing)" if absent else ""
