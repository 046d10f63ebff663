"""From a source to token ids: sources, records, documents, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NewType, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from pathlib import Path

ModelRef = NewType("ModelRef", str)
"""An option that names a model: a folder (relative ones count from the recipe's folder) or a hub name."""


@frozen
class Source:
    """One thing a reader may open: a file, or (`exists` false) a string in `data.path` that is no file."""

    path: str  # absolute for files; verbatim otherwise
    name: str  # relative to data.path, with forward slashes: what metadata and messages show
    size: int = 0  # bytes
    exists: bool = True
    modified: int | None = None  # nanoseconds, as the file system says; None: not known


@frozen
class Record:
    """One value as it stood in a source: a string or any JSON value."""

    value: Any
    source: str  # Source.name
    line: int | None = None  # 1-based, for line formats
    index: int = 0  # 0-based within the source
    byte: int = 0  # where it begins in the source; in a compressed one, in what it holds
    continues: bool = False  # the next record is more of this text: a very long one comes in parts

    @property
    def place(self) -> str:
        """`file:line` or `file[index]`, for messages."""
        return f"{self.source}:{self.line}" if self.line is not None else f"{self.source}[{self.index}]"


@frozen
class Damage:
    """What a reader yields in place of a record that it cannot read, if it can go on behind it."""

    source: str  # Source.name
    reason: str
    line: int | None = None  # 1-based
    index: int = 0  # 0-based, counted with the records
    byte: int = 0  # of the damage
    last: bool = False  # the rest of the source cannot be told apart and is left out with it
    begins: int | None = None  # with `last`: the byte where what is left out begins; None: at `byte`
    only: bool = False  # with `last`: it was the source's only record, so that one is left out and no more

    @property
    def message(self) -> str:
        """`file:line:byte: reason`, or `file[index] (byte N): reason`; the reason alone where it begins with the file."""
        if self.reason.startswith((f"{self.source}:", f"{self.source}[")):
            return self.reason
        if self.line is not None:
            return f"{self.source}:{self.line}:{self.byte}: {self.reason}"
        return f"{self.source}[{self.index}]{f' (byte {self.byte})' * bool(self.byte)}: {self.reason}"


@frozen
class Segment:
    """A stretch of text. Untrained text is context only. A `role` lets a chat template frame it."""

    text: str
    trained: bool = True
    role: str | None = None  # "user" | "assistant" | "system"


@frozen
class Document:
    """What is trained on: segments in order, and where they came from."""

    segments: tuple[Segment, ...]
    source: str
    index: int = 0
    opens: bool = True  # False: more of the document before it, one long text in parts
    closes: bool = True  # False: the next document is more of it

    @property
    def text(self) -> str:
        """All segments joined by newlines."""
        return "\n".join(s.text for s in self.segments)


class Tokenizer(Protocol):
    """A ready tokenizer. Text of a document never becomes a special token; only `markup=True` text may."""

    vocab_size: int  # ids are in [0, vocab_size)
    prefix_ids: tuple[int, ...]  # opens every document and prompt (usually a begin token, or nothing)
    end_id: int  # closes every document
    stop_ids: tuple[int, ...]  # generation stops at any of these; holds end_id
    fingerprint: str  # changes whenever the same text could give other ids
    has_chat_template: bool
    special_texts: tuple[str, ...]  # what `markup=True` reads as special tokens, e.g. "<|im_end|>"

    def encode(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Ids of each text, without prefix or end. `markup` reads special tokens written in the text.

        May be called from two threads at once.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """The chat template applied: markup text. `answer_next` ends where the assistant would begin."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` opens."""
        ...
