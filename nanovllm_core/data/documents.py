"""Sources -> records -> documents, as a stream that can be walked again; every record is accounted for.

Nothing is kept between walks but 2 bytes a source; memory holds one source's reader and one document. A walk costs
reading and parsing (hundreds of MB/s), which is small beside tokenising (about 5 MB/s), so whoever needs the documents
twice walks twice. Bad input stops the walk with a DataError, or is skipped and counted within a budget (`ledger.py`); a
record without text to train on is skipped and counted always.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from nanovllm_core.contracts import Damage, Document, Record, Source
from nanovllm_core.data.ledger import EMPTY, UNTRAINED, Counts, Ledger, Skipped
from nanovllm_core.data.opening import Unpackable
from nanovllm_core.data.sources import Progress, Sources, check_unchanged, fingerprint, suffix_of, tally
from nanovllm_core.errors import BrokenComponent, DataError

STRIDE = 1 << 20  # bytes between two reports of progress within one source


class Reader(Protocol):
    """What reads a source: a reader plugin's relay."""

    def read(self, source: Source) -> Iterator[Record | Damage]: ...


class Documents:
    """The documents of some sources, in order, as often as asked.

    `pick(source)` gives what reads it, or None for an unknown kind of file (counted in `unknown`, by suffix);
    `extract(record)` gives its document. `allow` is how much damage is skipped: a count, or a share of the records
    below 1; 0 is none. `counts` and `contents` hold what the last complete walk met.
    """

    def __init__(
        self,
        sources: Sources,
        pick: Callable[[Source], Reader | None],
        extract: Callable[[Record], Document | None],
        allow: float = 0,
    ) -> None:
        self.all, self.allow, self._extract = sources, allow, extract
        self.unknown: Counter[str] = Counter()  # suffix -> files that no reader takes
        self.files = self.bytes = 0  # of the sources that a reader takes
        self._readers: list[Reader | None] = [None]
        self._picked = array("H")  # of each source, its number in _readers
        for name, why in () if allow else sources.unreadable:
            raise DataError(f"{name}: {why}")
        for source in sources:
            reader = pick(source)
            if reader is not None:
                self.files += 1
                self.bytes += source.size
            elif source.exists:
                tally(self.unknown, suffix_of(source))
            else:
                raise DataError(f"data.path: {source.path!r} is neither a file nor a folder, and no reader takes it")
            if not any(reader is r for r in self._readers):
                self._readers.append(reader)
            self._picked.append(next(i for i, r in enumerate(self._readers) if r is reader))
        self.counts: Counts | None = None
        self.contents = array("Q")  # 64 bits of each document's text's hash

    def __iter__(self) -> Iterator[Document]:
        return self.walk()

    def known(self) -> Iterator[tuple[Source, Reader]]:
        """The sources that a reader takes, and the reader."""
        for source, number in zip(self.all, self._picked, strict=True):
            if reader := self._readers[number]:
                yield source, reader

    def walk(
        self, progress: Progress | None = None, tell: Callable[[Skipped], None] | None = None
    ) -> Iterator[Document]:
        """Every document that holds text to train on; `tell` hears of each record that is skipped.

        Raises DataError at bad input that is not allowed for, or if there is no document; BrokenComponent for what is no
        record or document.
        """
        ledger, contents = Ledger(self.all.path, self.allow, tell, self.bytes), array("Q")
        for name, why in self.all.unreadable:
            ledger.damage(Damage(source=name, reason=why, last=True), None)
        long: _Long | None = None
        for source, item in self._items(progress):
            if item is None:
                ledger.skip(Record(value="", source=source.name), EMPTY)
                continue
            if isinstance(item, Damage):
                if long:
                    raise DataError(f"{item.message} (inside one text in parts, of which some is given out already)")
                ledger.damage(item, source)
                continue
            try:
                document = self._document(item)
                long = long or _Long()
                yield from long.add(document, item)
            except DataError as e:
                if not self.allow or (long and long.parts):
                    raise
                long = None
                ledger.damage(
                    Damage(source=item.source, reason=str(e), line=item.line, index=item.index, byte=item.byte), source
                )
                continue
            if not item.continues:
                if long.reason:
                    ledger.skip(item, long.reason)
                else:
                    ledger.document(long.characters, long.bytes)
                    contents.append(long.content)
                long = None
        self.counts, self.contents = ledger.close(), contents
        if not self.counts.documents:
            raise DataError(self._nothing(self.counts))

    def count(self, progress: Progress | None = None) -> Counts:
        """What there is: one walk."""
        for _ in self.walk(progress):
            pass
        assert self.counts is not None, "a whole walk sets it"
        return self.counts

    def texts(
        self, leave_out: Callable[[int], bool] = lambda n: False, progress: Progress | None = None
    ) -> Iterator[str]:
        """The text of each document but those whose number is to be left out; a very long one in parts."""
        number = 0
        for document in self.walk(progress):
            if not leave_out(number):
                yield document.text
            number += document.closes

    def fingerprint(self, progress: Progress | None = None) -> str:
        """sha256 over names and contents of the sources that are read; records stand in where there is no file."""
        files = _Again(lambda: (s for s, _ in self.known() if s.exists))
        whole = hashlib.sha256(fingerprint(files, progress, lenient=bool(self.allow)).encode())
        for source, reader in self.known():
            if not source.exists:
                whole.update(source.name.encode("utf-8"))
                for record in self._read(source, reader):
                    if isinstance(record, Damage):
                        whole.update(record.message.encode("utf-8", "backslashreplace") + b"\n")
                    else:
                        whole.update(json.dumps(record.value, sort_keys=True).encode("ascii") + b"\n")
        return whole.hexdigest()

    def _document(self, record: Record) -> Document:
        document = self._extract(record)
        if document is None:
            raise DataError(f"{record.place}: none of data.extractors finds a document in this record")
        if not isinstance(document, Document):
            raise BrokenComponent(
                f"{record.place}: the first of data.extractors to answer gave {_type(document)}, not a Document or None"
            )
        return document

    def _items(self, progress: Progress | None) -> Iterator[tuple[Source, Record | Damage | None]]:
        """What each source holds; None for one that holds nothing."""
        done = told = 0
        if progress is not None:
            progress(0, self.bytes)
        for source, reader in self.known():
            empty = True
            for record in self._read(source, reader):
                empty = False
                here = done + min(record.byte, source.size)
                if progress is not None and here - told >= STRIDE and here < self.bytes:
                    told = here
                    progress(here, self.bytes)
                yield source, record
            if empty:
                yield source, None
            done += source.size
            if progress is not None and done - told >= STRIDE and done < self.bytes:
                told = done
                progress(done, self.bytes)
        if progress is not None and self.files:
            progress(self.bytes, self.bytes)  # once, whatever the last sources hold: it says that the walk is over

    def _read(self, source: Source, reader: Reader) -> Iterator[Record | Damage]:
        """The source's records, and Damage for what ends it if there is an allowance.

        Raises DataError when the file cannot be read or has changed, BrokenComponent when these are no records.
        """
        number, begins = -1, 0
        try:
            records: object = reader.read(source=source)
            if not isinstance(records, Iterable):
                raise BrokenComponent(
                    f"{source.name}: its reader's `read` gave {_type(records)}, not an iterator of Record"
                )
            for number, record in enumerate(records):
                if not isinstance(record, Record | Damage):
                    raise BrokenComponent(f"{source.name}[{number}]: its reader gave {_type(record)}, not a Record")
                begins = record.byte
                yield record
        except (OSError, DataError) as e:
            check_unchanged(source)
            reason = f"{source.name}: cannot be read ({e.strerror or e})" if isinstance(e, OSError) else str(e)
            if not self.allow:
                raise DataError(reason) from e
            byte = e.byte if isinstance(e, Unpackable) else begins  # not before the last record
            yield Damage(source=source.name, reason=reason, index=number + 1, byte=byte, last=True, begins=begins)
        check_unchanged(source)

    def _nothing(self, counts: Counts) -> str:
        kinds = ", ".join(f"{n} {suffix or '(no suffix)'}" for suffix, n in sorted(self.unknown.items()))
        parts = [f"files that no reader takes: {kinds}"] if kinds else []
        parts += [f"{n} records skipped: {reason}" for reason, n in counts.skipped.items()]
        if self.all.odd:
            parts.append(f"neither file nor folder: {', '.join(self.all.odd[:3])}")
        if self.all.hidden:
            parts.append(f"{self.all.hidden} hidden files and folders left out")
        return f"{self.all.path}: no documents; found: {'; '.join(parts) or 'nothing at all'}"


class _Again(Iterable[Source]):
    """An iterable over what `make` gives, each time anew."""

    def __init__(self, make: Callable[[], Iterator[Source]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Source]:
        return self._make()


class _Long:
    """A document, or the parts of a very long one, until it is known whether it holds text to train on."""

    def __init__(self) -> None:
        self.parts = self.characters = self.bytes = 0
        self.reason = EMPTY  # to skip it; nothing once there is none
        self._held: list[Document] = []
        self._hash = hashlib.blake2b(digest_size=8)

    @property
    def content(self) -> int:
        return int.from_bytes(self._hash.digest(), "little")

    def add(self, document: Document, record: Record) -> Iterator[Document]:
        """The documents that can be given out now."""
        if (self.parts or record.continues) and len(document.segments) != 1:
            raise DataError(f"{record.place}: a text in parts must be one segment")
        for number, segment in enumerate(document.segments):
            try:
                data = segment.text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise DataError(
                    f"{record.place}: half of a surrogate pair at character {e.start}, which is no text"
                ) from e
            self._hash.update(b"\n" + data if number else data)
            self.characters += len(segment.text)
            self.bytes += len(data)
            if data and not segment.text.isspace():
                self.reason = "" if segment.trained or not self.reason else UNTRAINED
        if self.parts or record.continues:
            document = _part(document, opens=not self.parts, closes=not record.continues)
        self.parts += 1
        self._held.append(document)
        if not self.reason:
            yield from self._held
            self._held.clear()


def _part(document: Document, *, opens: bool, closes: bool) -> Document:
    return Document(
        segments=document.segments, source=document.source, index=document.index, opens=opens, closes=closes
    )


def _type(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
