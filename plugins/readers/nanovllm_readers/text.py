"""Plain text: one file, one document, its characters untouched (line ends included), none of them NUL.

A file of up to a megabyte is one record. A longer one comes in parts, so that its size does not matter; for that it is
read twice, because none of it may be given out before all of it is known to be text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from nanovllm_core.contracts import Accept, Damage, Record, Refuse, Source, Verdict
from nanovllm_core.data.decoding import Nul, Text, Undecodable
from nanovllm_core.data.opening import Opened, Unpackable, content_name, opened
from nanovllm_core.hookspecs import hookimpl

PART = 1 << 20  # bytes of a record


def _is_text_encoding(instance: Any, attribute: Any, value: object) -> None:
    try:
        b"a".decode(value)  # type: ignore[arg-type]
    except UnicodeDecodeError:
        pass  # half of a UTF-16 unit
    except (LookupError, TypeError) as e:
        raise ValueError(f"got {value!r}, expected a text encoding that Python knows, such as utf-8 or latin-1") from e


@frozen(kw_only=True, eq=False)
class Txt:
    """Plain text files (.txt, also .gz or .zst), one document each.

    encoding: of the files, by Python's name for it; with utf-8 a byte order mark makes a file UTF-16 or UTF-32
    """

    encoding: str = field(default="utf-8", validator=_is_text_encoding)

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and content_name(source.name).endswith(".txt"):
            return Accept(why=".txt file")
        return Refuse("not a .txt file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record | Damage]:
        """The file as one string record, or the parts of one; Damage where it is no text."""
        return self._records(source)

    def _records(self, source: Source) -> Iterator[Record | Damage]:
        try:
            with opened(source, self.encoding) as content:
                text, start = Text(content, nul=False), content.start
                first = text.read(PART)
                if not (more := text.read(PART)):
                    yield Record(value=first, source=source.name, byte=start)
                    return
                while more:
                    more = text.read(PART)
            with opened(source, self.encoding) as content:
                yield from _parts(content, source.name)
        except Undecodable as e:
            reason = f"{e.reason}; {self._mend(e)}".removesuffix("; ")
            yield Damage(source.name, reason, e.line, byte=e.byte, last=True, begins=0, only=True)
        except Unpackable as e:
            yield Damage(source.name, str(e), byte=e.byte, last=True, begins=0, only=True)

    def _mend(self, problem: Undecodable) -> str:
        if problem.guess:
            return (
                "the file is probably UTF-16 without a byte order mark: save it as UTF-8, or set "
                f"`encoding: {problem.guess}` on the txt reader"
            )
        if isinstance(problem, Nul):
            return "remove it; or, if the file is UTF-16 without a byte order mark, save it as UTF-8"
        if codecs.lookup(self.encoding).name == "utf-8":
            return "save the file as UTF-8, or set `encoding` on the txt reader (e.g. latin-1)"
        return ""


def _parts(content: Opened, name: str) -> Iterator[Record]:
    text = Text(content)
    byte, part = text.byte, text.read(PART)
    while part:
        next_byte, after = text.byte, text.read(PART)
        yield Record(value=part, source=name, byte=byte, continues=bool(after))
        byte, part = next_byte, after
