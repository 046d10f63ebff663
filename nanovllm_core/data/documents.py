"""Sources -> records -> documents, as a stream that can be walked again; every record is accounted for.

Nothing is kept between walks: memory holds one source's reader and one document. A walk costs reading and parsing
(hundreds of MB/s), which is small beside tokenising (about 5 MB/s), so whoever needs the documents twice walks twice.
Bad input stops the walk with a DataError; a record without text to train on is skipped and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Protocol

from attrs import field, frozen

from nanovllm_core.contracts import Document, Record, Source
from nanovllm_core.data.sources import Progress, Sources, fingerprint, suffix_of
from nanovllm_core.errors import BrokenComponent, DataError

EMPTY = "empty"
UNTRAINED = "no text to train on"
STRIDE = 1 << 20  # bytes between two reports of progress within one source


class Reader(Protocol):
    """What reads a source: a reader plugin's relay."""

    def read(self, source: Source) -> Iterator[Record]: ...


@frozen(kw_only=True)
class Counts:
    """What a whole walk met: records = documents + everything skipped."""

    records: int = 0
    documents: int = 0
    characters: int = 0  # of the documents' text
    bytes: int = 0  # of the same in UTF-8
    skipped: Mapping[str, int] = field(factory=dict)  # reason -> records


class Documents:
    """The documents of some sources, in order, as often as asked.

    `pick(source)` gives what reads it, or None for an unknown kind of file (counted in `unknown`, by suffix);
    `extract(record)` gives its document. `counts` holds what the last complete walk met.
    """

    def __init__(
        self,
        sources: Sources,
        pick: Callable[[Source], Reader | None],
        extract: Callable[[Record], Document | None],
    ) -> None:
        self.all, self._extract = sources, extract
        self._known: list[tuple[Source, Reader]] = []
        self.unknown: Counter[str] = Counter()  # suffix -> files that no reader takes
        for source in sources:
            reader = pick(source)
            if reader is not None:
                self._known.append((source, reader))
            elif source.exists:
                self.unknown[suffix_of(source)] += 1
            else:
                raise DataError(f"data.path: {source.path!r} is neither a file nor a folder, and no reader takes it")
        self.bytes = sum(s.size for s, _ in self._known)
        self.counts: Counts | None = None

    @property
    def files(self) -> int:
        """Sources that a reader takes."""
        return len(self._known)

    def __iter__(self) -> Iterator[Document]:
        return self.walk()

    def walk(self, progress: Progress | None = None) -> Iterator[Document]:
        """Every document that holds text to train on.

        Raises DataError at the first bad record, or if there is none; BrokenComponent for what is no record or document.
        """
        records = documents = characters = size = 0
        skipped: Counter[str] = Counter()
        for record in self._records(progress):
            records += 1
            document = self._extract(record)
            if document is None:
                raise DataError(f"{record.place}: none of data.extractors finds a document in this record")
            if not isinstance(document, Document):
                raise BrokenComponent(
                    f"{record.place}: the first of data.extractors to answer gave {_type(document)}, not a Document or None"
                )
            if reason := _reason_to_skip(document):
                skipped[reason] += 1
                continue
            documents += 1
            for segment in document.segments:
                characters += len(segment.text)
                size += _utf8_length(segment.text, record)
            yield document
        self.counts = Counts(
            records=records, documents=documents, characters=characters, bytes=size, skipped=dict(skipped)
        )
        if not documents:
            raise DataError(self._nothing(self.counts))

    def count(self, progress: Progress | None = None) -> Counts:
        """What there is: one walk."""
        for _ in self.walk(progress):
            pass
        assert self.counts is not None, "a whole walk sets it"
        return self.counts

    def texts(self, leave_out: Container[int] = (), progress: Progress | None = None) -> Iterator[str]:
        """The text of each document whose number is not in `leave_out` (held-out documents make no vocabulary)."""
        for number, document in enumerate(self.walk(progress)):
            if number not in leave_out:
                yield document.text

    def fingerprint(self, progress: Progress | None = None) -> str:
        """sha256 over names and contents of the sources that are read; records stand in where there is no file."""
        whole = hashlib.sha256(fingerprint((s for s, _ in self._known if s.exists), progress).encode())
        for source, reader in self._known:
            if not source.exists:
                whole.update(source.name.encode("utf-8"))
                for record in _read(source, reader):
                    whole.update(json.dumps(record.value, sort_keys=True).encode("ascii") + b"\n")
        return whole.hexdigest()

    def _records(self, progress: Progress | None) -> Iterator[Record]:
        done = told = 0
        if progress is not None:
            progress(0, self.bytes)
        for source, reader in self._known:
            for record in _read(source, reader):
                here = done + min(record.byte, source.size)
                if progress is not None and here - told >= STRIDE and here < self.bytes:
                    told = here
                    progress(here, self.bytes)
                yield record
            done += source.size
            if progress is not None and done - told >= STRIDE and done < self.bytes:
                told = done
                progress(done, self.bytes)
        if progress is not None and self._known:
            progress(self.bytes, self.bytes)  # once, whatever the last sources hold: it says that the walk is over

    def _nothing(self, counts: Counts) -> str:
        kinds = ", ".join(f"{n} {suffix or '(no suffix)'}" for suffix, n in sorted(self.unknown.items()))
        parts = [f"files that no reader takes: {kinds}"] if kinds else []
        parts += [f"{n} records skipped: {reason}" for reason, n in counts.skipped.items()]
        if self._known and not counts.records:
            parts.append(f"{self.files} readable files without a record")
        if self.all.odd:
            parts.append(f"neither file nor folder: {', '.join(self.all.odd[:3])}")
        if self.all.hidden:
            parts.append(f"{self.all.hidden} hidden files and folders left out")
        return f"{self.all.path}: no documents; found: {'; '.join(parts) or 'nothing at all'}"


def _read(source: Source, reader: Reader) -> Iterator[Record]:
    """The source's records. Raises DataError when the file cannot be read, BrokenComponent when these are no records."""
    try:
        records: object = reader.read(source=source)
        if not isinstance(records, Iterable):
            raise BrokenComponent(
                f"{source.name}: its reader's `read` gave {_type(records)}, not an iterator of Record"
            )
        for number, record in enumerate(records):
            if not isinstance(record, Record):
                raise BrokenComponent(f"{source.name}[{number}]: its reader gave {_type(record)}, not a Record")
            yield record
    except OSError as e:
        raise DataError(f"{source.name}: cannot be read ({e.strerror or e})") from e


def _type(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _reason_to_skip(document: Document) -> str | None:
    if any(s.trained and s.text and not s.text.isspace() for s in document.segments):
        return None
    return EMPTY if all(not s.text or s.text.isspace() for s in document.segments) else UNTRAINED


def _utf8_length(text: str, record: Record) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as e:
        raise DataError(f"{record.place}: half of a surrogate pair at character {e.start}, which is no text") from e
