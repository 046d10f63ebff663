"""What became of every record: documents, and what was skipped for which reason. In = out + skipped, always.

Records that cannot be told apart count as one, however many they are: the rest of a file behind a missing comma, what was
cut off a packed one. A budget that is a share therefore weighs them in bytes too. Of a compressed file nobody can tell how
much is lost: its whole size counts against the share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from attrs import evolve, field, frozen

from nanovllm_core.contracts import Damage, Record, Source
from nanovllm_core.data.opening import PACKED
from nanovllm_core.errors import DataError

EMPTY = "empty"
UNTRAINED = "no text to train on"
BROKEN = "broken record"
UNREADABLE = "unreadable file, or the rest of it"
PLACE = re.compile(r"(?::(\d+)(?::(\d+))?|\[\d+\])?(?: \(byte (\d+)\))?: ")  # behind a file's name in a message


@frozen(kw_only=True)
class Counts:
    """What a whole walk met: records = documents + everything skipped."""

    records: int = 0  # one too: what cannot be told apart, as the rest of a file; a file that holds none
    documents: int = 0
    characters: int = 0  # of the documents' text
    bytes: int = 0  # of the same in UTF-8
    skipped: Mapping[str, int] = field(factory=dict)  # kind -> records
    size: int = 0  # bytes of the files, as they lie on disk
    lost: int = 0  # of these, what was left out as unreadable, where that can be told
    packed: int = 0  # and the size of compressed files of which an unknown part was left out
    rests: int = 0  # times that more than one record may have been left out as one

    @property
    def damaged(self) -> int:
        """Records and files that were skipped because they could not be read."""
        return self.skipped.get(BROKEN, 0) + self.skipped.get(UNREADABLE, 0)

    def within(self, allow: float) -> bool:
        """Whether a budget allows the damage: a count, or a share below 1 of the records and of the bytes too.

        A share always allows one, if that is a single record.
        """
        return not self._many(allow) and not self._heavy(allow)

    def _many(self, allow: float) -> bool:
        return self.damaged > (max(1, allow * self.records) if 0 < allow < 1 else allow)

    def _heavy(self, allow: float) -> bool:
        if not 0 < allow < 1 or (self.damaged == 1 and not self.rests):
            return False
        return self.lost + self.packed > allow * self.size

    @property
    def loss(self) -> str:
        """What was left out by the file, in bytes; empty if nothing was."""
        told = [f"{self.lost:,} of {self.size:,} bytes"] if self.lost else []
        told += [f"an unknown part of {self.packed:,} compressed bytes"] if self.packed else []
        return " and ".join(told)

    def excess(self, allow: float) -> str:
        """In what the damage is beyond a budget that does not allow it."""
        if self._many(allow):
            loss = f" ({self.loss})" if self.loss else ""
            told = f"{self.damaged:,} of {self.records:,} records or files{loss} cannot be read"
            return f"{told}, and data.max_errors allows {allow:g}"
        whole = " (a compressed file counts whole, since nobody can tell how much of it is lost)" if self.packed else ""
        return f"{self.loss} cannot be read, and data.max_errors allows a share of {allow:g} of the bytes too{whole}"


@frozen(kw_only=True)
class Skipped:
    """A line of `skipped.jsonl`."""

    source: str
    line: int | None
    index: int
    byte: int  # of the damage, else where the record begins; in a compressed file, in what it holds
    kind: str
    reason: str
    bytes_lost: int | None = None  # where the rest of a file is left out; null: nobody can tell, or it is one record


class Ledger:
    """Counts during one walk over `size` bytes of files. `tell` hears of everything that is skipped."""

    def __init__(self, path: str, allow: float, tell: Callable[[Skipped], None] | None = None, size: int = 0) -> None:
        self._path, self._allow, self._tell, self._size = path, allow, tell, size
        self._documents = self._characters = self._bytes = self._lost = self._packed = self._rests = 0
        self._skipped: Counter[str] = Counter()
        self._first = ""

    def document(self, characters: int, size: int) -> None:
        self._documents += 1
        self._characters += characters
        self._bytes += size

    def skip(self, record: Record, kind: str) -> None:
        self._note(
            Skipped(
                source=record.source, line=record.line, index=record.index, byte=record.byte, kind=kind, reason=kind
            )
        )

    def damage(self, damage: Damage, source: Source | None) -> None:
        """`source`: where it is, if that is a file.

        Raises DataError where none is allowed, or a count is exceeded; a share is known at the end.
        """
        if not self._allow:
            raise DataError(damage.message)
        self._first = self._first or damage.message
        lost = None
        if damage.last:
            lost = _bytes_lost(damage, source)
            self._rests += not damage.only
            self._lost += lost or 0
            self._packed += source.size if source and lost is None else 0
        damage = _placed(damage)
        self._note(
            Skipped(
                source=damage.source,
                line=damage.line,
                index=damage.index,
                byte=damage.byte,
                kind=UNREADABLE if damage.last else BROKEN,
                reason=damage.reason,
                bytes_lost=lost,
            )
        )
        if self._allow >= 1:
            self._check(self.counts)

    @property
    def counts(self) -> Counts:
        return Counts(
            records=self._documents + self._skipped.total(),
            documents=self._documents,
            characters=self._characters,
            bytes=self._bytes,
            skipped=dict(self._skipped),
            size=self._size,
            lost=self._lost,
            packed=self._packed,
            rests=self._rests,
        )

    def close(self) -> Counts:
        """The counts of the whole walk. Raises DataError where they exceed the budget."""
        self._check(self.counts)
        return self.counts

    def _check(self, counts: Counts) -> None:
        if not counts.within(self._allow):
            raise DataError(
                f"{self._path}: {counts.excess(self._allow)}; the first: {self._first}; `nanovllm analyze` shows what is "
                "wrong: mend it, or raise data.max_errors"
            )

    def _note(self, skipped: Skipped) -> None:
        self._skipped[skipped.kind] += 1
        if self._tell is not None:
            self._tell(skipped)


def _bytes_lost(damage: Damage, source: Source | None) -> int | None:
    """What is left out with the rest of a file; None where that cannot be told: bytes of what a packed file holds."""
    begins = damage.byte if damage.begins is None else damage.begins
    if source is None or not source.exists or begins > source.size or source.name.lower().endswith(PACKED):
        return None
    return source.size - begins


def _placed(damage: Damage) -> Damage:
    """The damage with a reason that does not repeat its place: the message of an error begins with it."""
    found = PLACE.match(damage.reason, len(damage.source)) if damage.reason.startswith(damage.source) else None
    if not found:
        return damage
    line, byte, other = found.groups()
    return evolve(
        damage,
        reason=damage.reason[found.end() :],
        line=int(line) if line else damage.line,
        byte=int(byte or other or damage.byte),
    )
