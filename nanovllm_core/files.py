"""Folders that appear whole or not at all: written aside, synced, described by a manifest, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanovllm_core.errors import OutputError, nearest

MANIFEST = "manifest.json"
JSON_BYTES = 16 << 20  # of a file of ours: far above any real one
LOCK = "plan.lock.json"  # what tells a run's output folder from others


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the system or safetensors says when something cannot be written, as an OutputError that names the place."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, OSError) and type(e).__name__ != "SafetensorError":
            raise
        reason = getattr(e, "strerror", None) or e
        raise OutputError(f"{place}: cannot be written ({reason}); what was saved before is untouched") from e


@contextmanager
def written_whole(folder: Path, told: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it at the end; an exception leaves `folder` as it was.

    `told`: lines of the manifest for files that other processes write there and sync; filled in by the end of the block.

    Every file is synced before the manifest (size and sha256 of each) is written, the manifest before the rename, the
    parent after it: whatever is found under the final name is complete. No system swaps two folders at once, so a
    process killed while it replaces one can leave nothing under the name: `recover` brings the old one back.
    """
    recover(folder)
    old, partial = _aside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        (partial / MANIFEST).touch()
        for p in files:
            share(p, partial / MANIFEST)
        manifest = {}
        for p in files:
            name = p.relative_to(partial).as_posix()
            manifest[name] = dict(told[name]) if name in told else described(p)
        for p in files:
            sync(p)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(partial / MANIFEST)
        for inner in sorted(p for p in partial.rglob("*") if p.is_dir()):
            sync(inner)
        sync(partial)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync(folder.parent)
    finally:
        recover(folder)


def described(path: Path) -> dict[str, Any]:
    """A file's line of a manifest."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def partial_of(folder: Path) -> Path:
    """Where `written_whole` has a folder written."""
    return _aside(folder)[1]


def recover(folder: Path) -> None:
    """Clear what a killed `written_whole` left beside `folder`; if it was killed between taking the old folder away and
    putting the new one there, the old one comes back. Call it only where nobody else writes `folder`."""
    old, partial = _aside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
        sync(folder.parent)
    for left in (old, partial):
        discard(left)


def discard(path: Path) -> None:
    """Remove a folder as far as it can be removed; of a link, the link alone."""
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _aside(folder: Path) -> tuple[Path, Path]:
    """Where the folder that is replaced waits, and where the new one is written."""
    return folder.with_name(f".{folder.name}.old"), folder.with_name(f".{folder.name}.partial")


def damage(folder: Path, holding: Iterable[str] = ()) -> str | None:
    """Why a folder written by `written_whole` cannot be trusted; None when every byte is as it was written.

    `holding`: names that the manifest must have. Nothing outside the folder is read, whatever the manifest or links say.
    """
    if reason := _no_file(folder, MANIFEST):
        return reason
    try:
        manifest = read_json(folder / MANIFEST)
        for name in holding:
            if name not in manifest:
                return f"{MANIFEST} does not name {name}"
        for name, told in manifest.items():
            size, sha256 = told["size"], told["sha256"]
            if reason := _no_file(folder, name):
                return reason
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
            if digest(folder / name) != sha256:
                return f"{name} has changed since it was written"
    except OSError as e:
        return f"{Path(e.filename or MANIFEST).name} cannot be read ({e.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} cannot be read ({type(e).__name__})"
    return None


def read_json(path: Path) -> Any:
    """What a small file of ours holds. Raises OSError, or ValueError for a link, a pipe, a device and what is no JSON."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError("it is no plain file")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_file(folder: Path, name: str) -> str | None:
    """Why `name` is no file of the folder's own; None when it is. A link is none: it may lead anywhere."""
    root = folder.resolve()
    path = root / name
    try:
        if path.resolve() != path or root not in path.parents:
            return f"{name} is a link or lies outside"
        if not path.exists():
            return f"{name} is missing"
    except (OSError, ValueError):  # a zero byte, a name that is too long
        return f"{name[:60]!a} cannot be a file's name"
    return None if path.is_file() else f"{name} is no file"


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a kill or a power cut leaves the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # a path that is no UTF-8 becomes a JSON escape
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut does not take them away."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def share(path: Path, like: Path) -> None:
    """Let whoever may read `like`, an ordinary new file, read `path` too: safetensors writes for its owner alone."""
    path.chmod(like.stat().st_mode & 0o777)


def sync(path: Path) -> None:
    """Make a file or a folder's entries durable (folders: where the system allows it)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def located(base: Path, given: str) -> Path:
    """The path that `given` names, counted from `base`; `~` is a home folder. Raises ValueError for what no path can be."""
    try:
        path = base / Path(given).expanduser()
        path.resolve().exists()  # a name that is too long or holds a zero byte, a loop of links
    except (OSError, RuntimeError, ValueError) as e:
        text = repr(given) if len(given) <= 60 else f"{given[:60]!r}..."
        raise ValueError(f"got {text}, which cannot be a path ({getattr(e, 'strerror', None) or e})") from None
    return path


def sibling(path: Path) -> str:
    """`; did you mean 'x'?` when a name close to a missing path's own stands in the same folder, else the empty string."""
    try:
        return nearest(path.name, os.listdir(path.parent))
    except (OSError, ValueError):  # ValueError: a name that no system allows
        return ""


def finite(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
