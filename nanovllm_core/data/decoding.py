"""The text of an opened file, and the exact place of what is none.

A NUL is a character of every encoding and of no text: it tells that a file is something else, mostly UTF-16 without a byte
order mark, whose Latin letters are valid UTF-8 with a NUL beside each. Looking for one costs nothing (GB/s).
"""

from __future__ import annotations

import codecs

from nanovllm_core.data.opening import Opened

SAMPLE = 1 << 12  # bytes that tell UTF-16 from a stray NUL
RARE = 32  # one NUL in more bytes than this is a stray one
SHORT = 4  # a file of so few bytes may be UTF-16 with a single NUL


class Undecodable(Exception):
    """Bytes that are no text in the file's encoding, and where: 1-based line, byte.

    `guess`: the encoding that the file is probably in, or empty.
    """

    def __init__(self, line: int, byte: int, reason: str, guess: str = "") -> None:
        super().__init__(reason)
        self.line, self.byte, self.reason, self.guess = line, byte, reason, guess


class Nul(Undecodable):
    """A NUL character."""


def utf16_guess(data: bytes, byte: int) -> str:
    """`utf-16-le` or `utf-16-be` if data that begins at a byte of the file has NULs as UTF-16 has them, else empty."""
    first = max(0, data.find(0) - SAMPLE // 2)
    sample, at = data[first : first + SAMPLE], byte + first
    few, many = sorted(found := (sample[at % 2 :: 2].count(0), sample[1 - at % 2 :: 2].count(0)))
    if not many or few * 8 > many or many * RARE < len(sample) or (many == 1 and (at or len(sample) > SHORT)):
        return ""
    return "utf-16-be" if many == found[0] else "utf-16-le"


class Text:
    """The text of an opened file, piece by piece.

    lenient: surrogates stand in for bytes that are no text, where there are some for them (`Opened.stand_ins`);
      `spoilt` tells that there were any
    nul: give out NUL characters too
    """

    def __init__(self, content: Opened, *, lenient: bool = False, nul: bool = True) -> None:
        self._lenient, self._nul, self.spoilt = lenient, nul, False
        self._content, self._decoder = content, codecs.getincrementaldecoder(content.codec)()
        self._byte, self._line = content.start, 1  # where the next piece begins
        self._sound = codecs.lookup(content.codec).name.startswith(
            ("utf-8", "utf-16", "utf-32")
        )  # others may spell half a surrogate pair
        self._problem: Undecodable | None = None

    @property
    def byte(self) -> int:
        """Where in the file the next piece begins."""
        return self._byte - len(self._decoder.getstate()[0])

    def read(self, size: int) -> str:
        """The text of about `size` bytes; empty at the end. Raises Undecodable, once what stands before it is given.

        Nul is raised in place of the piece that holds one.
        """
        if self._problem:
            raise self._problem
        text, data = "", b"more"
        while not text and data:
            data = self._content.file.read(size)
            kept = self._decoder.getstate()[0]
            raw, begin = kept + data, self._byte - len(kept)
            try:
                text = self._decode(data)
                if not self._sound:  # the encoding can spell half a surrogate pair, which is no text
                    text.encode("utf-8")
            except UnicodeDecodeError as e:
                good = raw[: e.start].decode(self._content.codec, self._content.stand_ins)
                self._check(good, raw, begin)
                self._problem = Undecodable(
                    self._line + good.count("\n"),
                    begin + e.start,
                    f"not valid {self._content.codec} ({e.reason})",
                    self._guess(raw, begin),
                )
                if not good:
                    raise self._problem from e
                return good
            except UnicodeEncodeError as e:
                raise Undecodable(
                    self._line + text.count("\n", 0, e.start),
                    self._byte,
                    "half of a surrogate pair, which is no character",
                ) from e
            self._check(text, raw, begin)
            self._byte += len(data)
            self._line += text.count("\n")
        return text

    def _decode(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, not data)
        except UnicodeDecodeError:
            if not self._lenient:
                raise
        self.spoilt, self._decoder.errors = True, self._content.stand_ins
        try:
            return self._decoder.decode(data, not data)
        finally:
            self._decoder.errors = "strict"

    def _check(self, text: str, raw: bytes, begin: int) -> None:
        """Raises Nul for the first one in the text of `raw`, which begins at a byte of the file."""
        if self._nul or "\0" not in text:
            return
        unit = self._content.unit
        at = next((i for i in range(0, len(raw), unit) if not any(raw[i : i + unit])), 0)
        line = self._line + text.count("\n", 0, text.index("\0"))
        raise Nul(line, begin + at, "a NUL character, which no text holds", self._guess(raw, begin))

    def _guess(self, raw: bytes, begin: int) -> str:
        return utf16_guess(raw, begin) if self._content.unit == 1 else ""
