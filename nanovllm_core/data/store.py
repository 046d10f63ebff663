"""The token store: every document's ids on disk, memory-mapped, made once and found again by its key.

    tokens.bin      uint16 (vocabularies up to 65,536) or uint32, documents one after another
    trained.bin     uint8, 1 where the token's prediction is trained
    documents.bin   one record a document: where it begins, how long it is, where it came from
    sources.json    names of the sources
    meta.json       the key, sizes, what the walk counted

Documents are tokenised in batches of a few MB as they are read, so memory grows neither with the corpus nor, but for
40 bytes each, with the number of documents. A store is built under another name and renamed when it is complete and on
disk; one that was interrupted is never opened. Two processes that build the same one do the work twice and agree.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nanovllm_core.contracts import Document, Tokenizer
from nanovllm_core.data.documents import Counts, Documents
from nanovllm_core.data.encode import RULES, Encoder
from nanovllm_core.errors import DataError, OutputError
from nanovllm_core.files import sync

FORMAT = 1
BATCH = 2_000_000  # characters tokenised at once
STALE = 3600.0  # seconds without a write after which an unfinished store is a dead process's
DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # first token, counted over the store
        ("length", "<i8"),  # tokens
        ("bytes", "<i8"),  # of the text whose tokens are trained
        ("source", "<i4"),  # line of sources.json
        ("record", "<i8"),  # 0-based within the source
    ]
)


class Store:
    """An open store. `tokens`, `trained` and `documents` are read-only maps of the files."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.tokens: NDArray[Any] = np.asarray(np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"))
        self.trained: NDArray[np.uint8] = np.asarray(np.memmap(folder / "trained.bin", dtype=np.uint8, mode="r"))
        self.documents: NDArray[Any] = np.asarray(np.memmap(folder / "documents.bin", dtype=DOCUMENT, mode="r"))
        self.counts = Counts(**meta["counts"])
        self._sources: list[str] | None = None

    def __len__(self) -> int:
        return len(self.documents)

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


def known_counts(root: Path, documents_key: str) -> Counts | None:
    """What a walk over the documents of this key met, if a store under `root` remembers."""
    for path in root.glob("[!.]*/meta.json"):
        try:
            meta = json.loads(path.read_text("utf-8"))
            if meta["documents"] == documents_key and meta["format"] == FORMAT:
                return Counts(**meta["counts"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


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
        _remove_dead(root)
        building = Path(tempfile.mkdtemp(prefix=f".building-{key[:12]}-", dir=root))
    except OSError as e:
        raise OutputError(f"{root}: the token store cannot be made there ({e.strerror})") from e
    try:
        _build(building, {"key": key, "documents": documents_key}, documents, tokenizer, progress)
        _publish(building, folder, key)
        for meta in root.glob("[!.]*/meta.json"):
            if meta.parent != folder and _is_store(meta.parent):
                shutil.rmtree(meta.parent, ignore_errors=True)
    except OSError as e:
        raise OutputError(f"{root}: the token store cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(building, ignore_errors=True)
    store = Store.open(folder, key)
    if store is None:
        raise OutputError(f"{folder}: the token store that was just written cannot be read back")
    return store


def _is_store(folder: Path) -> bool:
    """Whether `_build` made it, and nobody put anything else there."""
    return {p.name for p in folder.iterdir()} <= {
        "tokens.bin",
        "trained.bin",
        "documents.bin",
        "sources.json",
        "meta.json",
    }


def _build(
    folder: Path,
    keys: dict[str, str],
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None,
) -> None:
    encoder, dtype = Encoder(tokenizer), "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    sources: list[str] = []
    start = 0
    names = ("tokens.bin", "trained.bin", "documents.bin")
    with (
        (folder / names[0]).open("wb") as tokens,
        (folder / names[1]).open("wb") as trained,
        (folder / names[2]).open("wb") as index,
    ):
        for batch in _batches(documents.walk(progress)):
            rows = []
            for document, encoded in zip(batch, encoder.encode(batch), strict=True):
                if not sources or sources[-1] != document.source:
                    sources.append(document.source)
                if len(encoded.ids) and int(encoded.ids.max()) >= tokenizer.vocab_size:
                    raise DataError(
                        f"{document.source}[{document.index}]: the tokenizer gave id {int(encoded.ids.max())}, "
                        f"but its vocabulary has {tokenizer.vocab_size}"
                    )
                rows.append((start, len(encoded.ids), encoded.bytes, len(sources) - 1, document.index))
                start += len(encoded.ids)
                tokens.write(encoded.ids.astype(dtype).tobytes())
                trained.write(encoded.trained.tobytes())
            index.write(np.array(rows, DOCUMENT).tobytes())
    (folder / "sources.json").write_text(json.dumps(sources, ensure_ascii=False, indent=0), "utf-8")
    counts = documents.counts
    assert counts is not None, "a whole walk sets it"
    sizes = {name: (folder / name).stat().st_size for name in (*names, "sources.json")}
    meta = {**keys, "format": FORMAT, "dtype": dtype, "tokens": start, "sizes": sizes}
    meta["counts"] = attrs.asdict(counts)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[Sequence[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(len(s.text) for s in document.segments) + 64  # so that tiny documents make batches too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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


def _remove_dead(root: Path) -> None:
    for folder in root.glob(".building-*"):
        newest = max((p.stat().st_mtime for p in [folder, *folder.glob("*")]), default=0.0)
        if time.time() - newest > STALE:
            shutil.rmtree(folder, ignore_errors=True)
