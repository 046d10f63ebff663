"""Building a token store: reading, tokenising and writing overlap, and a build that was killed goes on.

The calling thread reads and writes; two others tokenise, one turning ids into arrays while the tokenizer's own threads
(all cores) work on the other's batch. In flight are at most four batches of some MB, so memory grows neither with the
corpus nor, but for 8 bytes each, with the number of documents.

After every 32 million characters what is written is made durable and noted. The next build reads the documents from the
start (hundreds of MB/s) and tokenises from the note on; both give the same files.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import numpy as np

from nanovllm_core.contracts import Document, Tokenizer
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.encode import Encoded, Encoder
from nanovllm_core.data.ledger import Skipped
from nanovllm_core.errors import DataError
from nanovllm_core.files import sync

BATCH = 1_000_000  # characters tokenised at once
SAVE = 32_000_000  # characters between two notes
WORKERS = 2
NOTE = "progress.json"
DATA = ("tokens.bin", "trained.bin", "documents.bin")  # written as tokenising goes on
FILES = (*DATA, "contents.bin", "sources.json", "skipped.jsonl")
DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # first token, counted over the store
        ("length", "<i8"),  # tokens
        ("bytes", "<i8"),  # of the text whose tokens are trained
        ("source", "<i4"),  # line of sources.json
        ("record", "<i8"),  # 0-based within the source
    ]
)
Batch = Sequence[tuple[Document, int]]  # with the number of its source


def build(
    folder: Path,
    keys: dict[str, Any],
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write all files of a store into `folder`, going on where an earlier build of the same `keys` was interrupted.

    Raises DataError, OSError.
    """
    encoder = Encoder(tokenizer)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with (
        _Writer(folder, keys, dtype, tokenizer.vocab_size) as writer,
        (folder / "sources.json").open("w", encoding="utf-8") as names,
        (folder / "skipped.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as ledger,
    ):

        def tell(skipped: Skipped) -> None:
            ledger.write(json.dumps(attrs.asdict(skipped), ensure_ascii=False) + "\n")

        pieces = encoder.recut(documents.walk(progress, tell))
        for batch, ids in encoded(encoder, batches(_numbered(pieces, names), writer.pieces)):
            writer.write(batch, ids)
    counts = documents.counts
    assert counts is not None, "a whole walk sets it"
    (folder / "contents.bin").write_bytes(np.array(documents.contents, "<u8").tobytes())
    (folder / NOTE).unlink(missing_ok=True)
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    meta = {**keys, "dtype": dtype, "tokens": writer.tokens, "sizes": sizes, "counts": attrs.asdict(counts)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _numbered(pieces: Iterable[Document], names: Any) -> Iterator[tuple[Document, int]]:
    """The pieces with the numbers of their sources, whose names are written as a JSON array."""
    number, last = -1, None
    for piece in pieces:
        if piece.source != last:
            number, last = number + 1, piece.source
            names.write((",\n" if number else "[\n") + json.dumps(last, ensure_ascii=False))
        yield piece, number
    names.write("\n]" if number >= 0 else "[]")


def batches(pieces: Iterable[tuple[Document, int]], done: int = 0) -> Iterator[Batch]:
    """The pieces but for the first `done`, in batches of about BATCH characters."""
    batch: list[tuple[Document, int]] = []
    size = 0
    for number, (piece, source) in enumerate(pieces):
        if number < done:
            continue
        batch.append((piece, source))
        size += sum(len(s.text) for s in piece.segments) + 64  # so that tiny documents make batches too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(encoder: Encoder, batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Encoded]]]:
    """Each batch with its ids, in order, while the next ones are worked on."""
    waiting: deque[tuple[Batch, Future[list[Encoded]]]] = deque()
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="tokenising")
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encoder.encode, [piece for piece, _ in batch])))
            if len(waiting) > WORKERS:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """The files that grow with the tokens, and the note of how far they are good."""

    def __init__(self, folder: Path, keys: dict[str, Any], dtype: str, vocab_size: int) -> None:
        self._folder, self._keys, self._dtype, self._vocab_size = folder, keys, dtype, vocab_size
        self.pieces = self.tokens = 0
        self._row: list[int] | None = None  # of the document whose next part is still to come
        self._since = 0
        sizes = dict.fromkeys(DATA, 0)
        if note := self._noted():
            self.pieces, self.tokens, self._row, sizes = note["pieces"], note["tokens"], note["row"], note["sizes"]
        self._open = ExitStack()
        self._files = [self._open.enter_context(_at(folder / name, sizes[name])) for name in DATA]

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def write(self, batch: Batch, found: Sequence[Encoded]) -> None:
        """Raises DataError for an id that the vocabulary does not have."""
        rows = []
        for (piece, source), one in zip(batch, found, strict=True):
            size = len(one.ids)
            if size and int(one.ids.max()) >= self._vocab_size:
                raise DataError(
                    f"{piece.source}[{piece.index}]: the tokenizer gave id {int(one.ids.max())}, but its vocabulary has "
                    f"{self._vocab_size}"
                )
            row = self._row or [self.tokens, 0, 0, source, piece.index]
            row[1] += size
            row[2] += one.bytes
            self.tokens += size
            self._row = None if piece.closes else row
            if piece.closes:
                rows.append(tuple(row))
        self._files[0].write(np.concatenate([one.ids for one in found]).astype(self._dtype).tobytes())
        self._files[1].write(np.concatenate([one.trained for one in found]).tobytes())
        self._files[2].write(np.array(rows, DOCUMENT).tobytes())
        self.pieces += len(batch)
        self._since += sum(len(s.text) for piece, _ in batch for s in piece.segments)
        if self._since >= SAVE:
            self._since = 0
            self._save()

    def _save(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        note = {
            "keys": self._keys,
            "pieces": self.pieces,
            "tokens": self.tokens,
            "row": self._row,
            "sizes": {name: file.tell() for name, file in zip(DATA, self._files, strict=True)},
        }
        partial = self._folder / f".{NOTE}.partial"
        partial.write_text(json.dumps(note), "utf-8")
        sync(partial)
        os.replace(partial, self._folder / NOTE)
        sync(self._folder)

    def _noted(self) -> dict[str, Any] | None:
        """The note of an interrupted build, if its files still hold what it says."""
        try:
            note: dict[str, Any] = json.loads((self._folder / NOTE).read_text("utf-8"))
            whole = all((self._folder / name).stat().st_size >= note["sizes"][name] for name in DATA)
            return note if whole and note["keys"] == self._keys else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _at(path: Path, size: int) -> BinaryIO:
    """The file, cut to its first `size` bytes, to be written on."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file
