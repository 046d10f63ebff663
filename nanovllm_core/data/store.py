"""The token store: every document's ids on disk, memory-mapped, made once and found again by its key.

    tokens.bin      uint16 (vocabularies up to 65,536) or uint32, documents one after another
    trained.bin     uint8, 1 where the token's prediction is trained
    documents.bin   one record a document: where it begins, how long it is, where it came from
    contents.bin    uint64, the hash of each document's text
    sources.json    names of the sources
    skipped.jsonl   one object for each record that made no document, and why
    meta.json       the key, sizes, what the walk counted

A store is built under another name (`building.py`) and renamed when it is complete and on disk; one that was interrupted
is never opened, but gone on with by the next process that wants it. A second process that builds the same one at the
same time does the work twice, and they agree.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.data.building import DOCUMENT, FILES, build
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.encode import RULES
from nanovllm_core.data.ledger import Counts
from nanovllm_core.errors import NanoError, OutputError
from nanovllm_core.files import sync

FORMAT = 3
STALE = 3600.0  # seconds without a write after which another unfinished store is a dead process's


class Store:
    """An open store. `tokens`, `trained`, `documents` and `contents` are read-only maps of the files."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.tokens: NDArray[Any] = _mapped(folder / "tokens.bin", meta["dtype"])
        self.trained: NDArray[np.uint8] = _mapped(folder / "trained.bin", np.uint8)
        self.documents: NDArray[Any] = _mapped(folder / "documents.bin", DOCUMENT)
        self.contents: NDArray[np.uint64] = _mapped(folder / "contents.bin", np.uint64)
        self.counts = Counts(**meta["counts"])
        self._sources: list[str] | None = None

    def __len__(self) -> int:
        return len(self.documents)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder, self.meta)  # another process maps the files itself

    @property
    def sources(self) -> list[str]:
        """Names of the sources, by number; read when first asked for."""
        if self._sources is None:
            self._sources = json.loads((self.folder / "sources.json").read_text("utf-8"))
        return self._sources

    def ids(self, number: int) -> NDArray[Any]:
        """The tokens of a document."""
        row = self.documents[number]
        return self.tokens[row["start"] : row["start"] + row["length"]]

    def marks(self, number: int) -> NDArray[np.uint8]:
        """Which tokens of a document are trained."""
        row = self.documents[number]
        return self.trained[row["start"] : row["start"] + row["length"]]

    def source(self, number: int) -> str:
        """The name of the source of a document."""
        return self.sources[int(self.documents[number]["source"])]

    @classmethod
    def open(cls, folder: Path, key: str) -> Store | None:
        """The store in `folder`, if it is whole and has this key."""
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(folder, meta) if meta.get("key") == key and sizes == meta["sizes"] else None


def store_key(documents_key: str, tokenizer: Tokenizer) -> str:
    """What a store is known by: its documents' key and the tokenizer."""
    parts = [FORMAT, RULES, documents_key, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def known(root: Path, documents_key: str) -> tuple[Counts, NDArray[np.uint64]] | None:
    """What a walk over the documents of this key met, and their contents, if a store under `root` remembers."""
    for path in root.glob("[!.]*/meta.json"):
        try:
            meta = json.loads(path.read_text("utf-8"))
            if meta["documents"] == documents_key and meta["format"] == FORMAT:
                counts, contents = Counts(**meta["counts"]), np.fromfile(path.parent / "contents.bin", np.uint64)
                if len(contents) == counts.documents:
                    return counts, contents
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def open_or_build(
    root: Path,
    documents_key: str,
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The store of these documents and this tokenizer under `root`: found, or built and all others removed.

    `documents_key` changes whenever the documents do. Raises DataError, OutputError.
    """
    key = store_key(documents_key, tokenizer)
    folder = root / key[:32]
    if found := Store.open(folder, key):
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _building(root, key) as building:
            build(building, {"key": key, "documents": documents_key, "format": FORMAT}, documents, tokenizer, progress)
            _publish(building, folder, key)
        for meta in root.glob("[!.]*/meta.json"):
            if meta.parent != folder and _is_store(meta.parent):
                shutil.rmtree(meta.parent, ignore_errors=True)
    except OSError as e:
        raise OutputError(f"{root}: the token store cannot be made or written there ({e.strerror or e})") from e
    store = Store.open(folder, key)
    if store is None:
        raise OutputError(f"{folder}: the token store that was just written cannot be read back")
    return store


def _is_store(folder: Path) -> bool:
    """Whether `build` made it, and nobody put anything else there."""
    return {p.name for p in folder.iterdir()} <= {*FILES, "meta.json"}


@contextmanager
def _building(root: Path, key: str) -> Iterator[Path]:
    """A folder to build in: the one that an interrupted process left, or one apart while another process has that.

    It stays when the process is interrupted, and goes when the documents are at fault.
    """
    from filelock import FileLock, Timeout

    folder = root / f".building-{key[:12]}"
    _remove_dead(root, folder)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=root))
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    except NanoError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock.is_locked:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(building: Path, folder: Path, key: str) -> None:
    for path in building.iterdir():
        sync(path)
    sync(building)
    if folder.exists() and Store.open(folder, key) is None:
        shutil.rmtree(folder)
    try:
        building.rename(folder)
    except OSError:
        if Store.open(folder, key) is None:  # unless another process was first
            raise
    sync(folder.parent)


def _remove_dead(root: Path, own: Path) -> None:
    for folder in root.glob(".building-*"):
        newest = max((p.stat().st_mtime for p in [folder, *folder.glob("*")]), default=0.0)
        if folder.is_dir() and folder != own and time.time() - newest > STALE:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)
