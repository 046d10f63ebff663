"""Plain text: one file, one document, its characters untouched (line ends included).

The whole file is held in memory while it is read: one file is one document, and a document is one string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from nanovllm_core.contracts import Accept, Record, Refuse, Source, Verdict
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _is_text_encoding(instance: Any, attribute: Any, value: object) -> None:
    try:
        b"a".decode(value)  # type: ignore[arg-type]
    except UnicodeDecodeError:
        pass  # half of a UTF-16 unit
    except (LookupError, TypeError) as e:
        raise ValueError(f"got {value!r}, expected a text encoding that Python knows, such as utf-8 or latin-1") from e


@frozen(kw_only=True, eq=False)
class Txt:
    """Plain text files (.txt), one document each.

    encoding: of the files, by Python's name for it; a byte order mark before UTF-8 is dropped
    """

    encoding: str = field(default="utf-8", validator=_is_text_encoding)

    @hookimpl
    def probe(self, source: Source) -> Verdict:
        """By the file's name."""
        if source.exists and source.name.lower().endswith(".txt"):
            return Accept(why=".txt file")
        return Refuse("not a .txt file")

    @hookimpl
    def read(self, source: Source) -> Iterator[Record]:
        """The file as one string record. Raises DataError where it does not decode."""
        return self._records(source)

    def _records(self, source: Source) -> Iterator[Record]:
        with open(source.path, "rb") as file:
            data = file.read()
        utf8 = codecs.lookup(self.encoding).name == "utf-8"
        skip = len(codecs.BOM_UTF8) if utf8 and data.startswith(codecs.BOM_UTF8) else 0
        try:
            text = data[skip:].decode(self.encoding)
            text.encode("utf-8")  # some encodings can spell lone surrogates, which are no text
        except UnicodeDecodeError as e:
            byte = e.start + skip
            line = data.count(b"\n", 0, byte) + 1
            hint = "; save the file as UTF-8, or set `encoding` on the txt reader (e.g. latin-1)" if utf8 else ""
            if data.startswith(UTF16):
                hint = "; it looks like UTF-16: set `encoding: utf-16` on the txt reader"
            raise DataError(f"{source.name}:{line}:{byte}: not valid {self.encoding} ({e.reason}){hint}") from e
        except UnicodeEncodeError as e:
            raise DataError(f"{source.name}: holds half of a surrogate pair, which is no character ({e.reason})") from e
        yield Record(value=text, source=source.name, byte=skip)
