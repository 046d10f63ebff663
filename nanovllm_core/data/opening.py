"""Opening what a source holds: plain, `.gz` or `.zst` (members one behind the other too), UTF-8, or by its byte order
mark UTF-16 or UTF-32.

Everything is a stream: memory holds a piece of some megabytes, whatever the size of the file or what it unpacks to. The
cost is one copy of each byte (GB/s). Bytes are counted in what a compressed file holds, behind nothing: a byte order
mark counts.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO

from attrs import frozen

from nanovllm_core.contracts import Source
from nanovllm_core.errors import DataError

PACKED = (".gz", ".zst")
PIECE = 1 << 20  # bytes read at once
FED = 1 << 11  # compressed bytes given to zstd at once: they unpack to 64 MB at the very most
MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def content_name(name: str) -> str:
    """The name without `.gz` or `.zst`, in lower case: what tells the kind of the content."""
    name = name.lower()
    return next((name.removesuffix(s) for s in PACKED if name.endswith(s)), name)


@frozen(eq=False)
class Opened:
    """A file's content behind its byte order mark."""

    file: BinaryIO
    codec: str
    start: int  # bytes of the mark

    @property
    def unit(self) -> int:
        """Bytes of the codec's smallest character."""
        return {"utf-16": 2, "utf-32": 4}.get(codecs.lookup(self.codec).name[:6], 1)

    @property
    def stand_ins(self) -> str:
        """Python's name for the way that bytes which are no text stand in a text as lone surrogates, and turn back."""
        return "surrogateescape" if self.unit == 1 else "surrogatepass"


class Unpackable(DataError):
    """Compressed data that is damaged or cut off; `byte`: how much content came before."""

    def __init__(self, message: str, byte: int) -> None:
        super().__init__(message)
        self.byte = byte


@contextmanager
def opened(source: Source, encoding: str = "utf-8") -> Iterator[Opened]:
    """Open a source. Where `encoding` is UTF-8 a byte order mark decides; any other is taken at its word.

    Raises OSError; reading raises Unpackable where compressed data is damaged or ends too early.
    """
    with open(source.path, "rb") as file:
        pieces = _unpacked(file, source.name)
        head = b""
        while len(head) < 4 and (piece := next(pieces, b"")):
            head += piece
        mark, codec = b"", encoding
        if codecs.lookup(encoding).name == "utf-8":
            mark, codec = next(((m, c) for m, c in MARKS if head.startswith(m)), (b"", "utf-8"))
        content = io.BufferedReader(_Pieces(chain([head[len(mark) :]], pieces)), PIECE)
        yield Opened(content, codec, len(mark))


def _unpacked(file: BinaryIO, name: str) -> Iterator[bytes]:
    if name.lower().endswith(".gz"):
        return _whole(_gzip(file), file, name)
    if name.lower().endswith(".zst"):
        return _whole(_zstd(file), file, name)
    return iter(lambda: file.read(PIECE), b"")


def _whole(pieces: Iterator[bytes], file: BinaryIO, name: str) -> Iterator[bytes]:
    """The pieces, with every way to be damaged as one error."""
    from zstandard import ZstdError

    done = 0
    try:
        for piece in pieces:
            done += len(piece)
            yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile, ZstdError) as e:
        raise Unpackable(
            f"{name}: the compressed data is damaged or cut off near byte {file.tell():,} of the packed file "
            f"({str(e).rstrip('.')}); fetch or pack it again",
            done,
        ) from e


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as inner:
        while piece := inner.read1(PIECE):
            yield piece


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a file that was cut off for a whole one."""
    from zstandard import ZstdDecompressor

    frame = None
    while fed := file.read(FED):
        while fed:
            frame = frame or ZstdDecompressor().decompressobj()
            if piece := frame.decompress(fed):
                yield piece
            fed = b""
            if frame.eof:
                fed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends inside a frame")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._left = iter(pieces), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
