"""What became of every record: documents, and what was skipped for which reason. In = out + skipped, always."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from attrs import field, frozen

from nanovllm_core.contracts import Damage, Record
from nanovllm_core.errors import DataError

EMPTY = "empty"
UNTRAINED = "no text to train on"
BROKEN = "broken record"
UNREADABLE = "unreadable file, or the rest of it"


@frozen(kw_only=True)
class Counts:
    """What a whole walk met: records = documents + everything skipped."""

    records: int = 0  # what cannot be told apart, as an unreadable file, is one
    documents: int = 0
    characters: int = 0  # of the documents' text
    bytes: int = 0  # of the same in UTF-8
    skipped: Mapping[str, int] = field(factory=dict)  # kind -> records

    @property
    def damaged(self) -> int:
        """Records and files that were skipped because they could not be read."""
        return self.skipped.get(BROKEN, 0) + self.skipped.get(UNREADABLE, 0)

    def within(self, allow: float) -> bool:
        """Whether a budget allows the damage: a count, or a share of the records below 1, of which one is allowed always."""
        return self.damaged <= (max(1, allow * self.records) if 0 < allow < 1 else allow)


@frozen(kw_only=True)
class Skipped:
    """A line of `skipped.jsonl`."""

    source: str
    line: int | None
    index: int
    byte: int
    kind: str
    reason: str


class Ledger:
    """Counts during one walk. `tell` hears of everything that is skipped."""

    def __init__(self, path: str, allow: float, tell: Callable[[Skipped], None] | None = None) -> None:
        self._path, self._allow, self._tell = path, allow, tell
        self._documents = self._characters = self._bytes = 0
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

    def damage(self, damage: Damage, kind: str) -> None:
        """Raises DataError where none is allowed, or a count is exceeded; a share is known at the end."""
        if not self._allow:
            raise DataError(damage.message)
        self._first = self._first or damage.message
        self._note(
            Skipped(
                source=damage.source,
                line=damage.line,
                index=damage.index,
                byte=damage.byte,
                kind=kind,
                reason=damage.reason,
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
        )

    def close(self) -> Counts:
        """The counts of the whole walk. Raises DataError where they exceed the budget."""
        self._check(self.counts)
        return self.counts

    def _check(self, counts: Counts) -> None:
        if not counts.within(self._allow):
            raise DataError(
                f"{self._path}: {counts.damaged:,} of {counts.records:,} records or files cannot be read, and data.max_errors "
                f"allows {self._allow:g}; the first: {self._first}; `nanovllm analyze` shows what is wrong: mend it, or raise "
                "data.max_errors"
            )

    def _note(self, skipped: Skipped) -> None:
        self._skipped[skipped.kind] += 1
        if self._tell is not None:
            self._tell(skipped)
