"""A window that slides over the text of a file and knows the line and byte of each of its characters.

It holds what is not parsed yet and grows to twice its size until a record is whole, so that the work stays linear and
memory is one record and a piece. Bytes are counted by encoding again what is passed; where all is ASCII they are the
characters. Bytes that are no text spoil the record that holds them and no other: surrogates stand in for them, which
turn back into the same bytes.
"""

from __future__ import annotations

import re
from typing import Any

from nanovllm_core.data.decoding import SAMPLE, Text
from nanovllm_core.data.opening import Opened
from nanovllm_readers.reasons import of_nul
from nanovllm_readers.strict import TOKEN, Problem, parse, skip, skip_space

PIECE = 1 << 18  # bytes; about what the processor's cache holds
LOST = 1 << 24  # characters in which the end of a damaged record must show itself
NO_TEXT = re.compile("[\ud800-\udfff]")  # what stands in for bytes that are no text


class Window:
    """`text`, of which everything before `position` is done with."""

    def __init__(self, content: Opened, limit: int) -> None:
        self._file, self._content, self._limit = Text(content, lenient=True), content, limit
        self.text, self.position, self.final = "", 0, False
        self._marked = 0  # the character up to which bytes are counted
        self._byte, self._line = content.start, 1  # of `_marked`, of text[0]
        self._ascii = self._one_byte = content.unit == 1

    def byte(self, position: int) -> int:
        """Where a character at or behind `position` lies in the file."""
        told = self.text[self._marked : position]
        return self._byte + (len(told) if self._ascii else len(self._encoded(told)))

    def line(self, position: int) -> int:
        """The 1-based line of a character."""
        return self._line + self.text.count("\n", 0, position)

    def more(self) -> bool:
        """Let go of what is done with and read on; False at the end. Raises Undecodable in place of what is no text."""
        if self.final:
            return False
        left = self.text[self.position :]
        fresh = self._file.read(max(PIECE, len(left)))
        self._byte, self._line = self.byte(self.position), self.line(self.position)
        self.text, self.position, self._marked = left + fresh, 0, 0
        self._ascii = self._one_byte and self.text.isascii()
        self.final = not fresh
        return True

    def space(self) -> str:
        """Go to the next character that is no white space, and look at it; empty at the end."""
        while True:
            self.position = skip_space(self.text, self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def value(self) -> tuple[Any, int]:
        """The value at `position` and the byte where it begins; goes behind it. Raises Problem, Undecodable."""
        while True:
            try:
                value, end = parse(self.text, self.position, final=self.final)
                break
            except Problem as e:
                if not e.open:
                    raise
                self._within_limit(len(self.text))
            self.more()
        self._within_limit(end)
        if self._file.spoilt and (found := NO_TEXT.search(self.text, self.position, end)):
            raise Problem(found.start(), self._why(found.start()))
        self._byte, self._marked = self.byte(self.position), self.position
        begin, self.position = self._byte, end
        return value, begin

    def _within_limit(self, end: int) -> None:
        if end - self.position > self._limit:
            what = f"a record of more than {self._limit:,} characters; `max_record` on the json reader allows more"
            raise Problem(self.position, what)

    def first(self, problem: Problem) -> Problem:
        """The problem, or the bytes that are no text if there are some before it or where it is; or a NUL as such."""
        if self.text[problem.position : problem.position + 1] == "\0":
            before = self._encoded(self.text[max(0, problem.position - SAMPLE) : problem.position])
            behind = self._encoded(self.text[problem.position : problem.position + SAMPLE])
            sample = before + behind if self._one_byte else b""
            return Problem(problem.position, of_nul(sample, self.byte(problem.position) - len(before)))
        if not self._file.spoilt:
            return problem
        token = TOKEN.match(self.text, problem.position)
        end = token.end() if token else problem.position + 1
        found = NO_TEXT.search(self.text, self.position, end)
        return Problem(found.start(), self._why(found.start())) if found else problem

    def _why(self, position: int) -> str:
        """What is wrong with the bytes that the surrogate at `position` stands for."""
        try:
            self._encoded(self.text[position : position + 4]).decode(self._content.codec)
        except UnicodeDecodeError as e:
            return f"not valid {self._content.codec} ({e.reason})"
        return f"not valid {self._content.codec}"

    def _encoded(self, text: str) -> bytes:
        return text.encode(self._content.codec, self._content.stand_ins)

    def skip(self) -> bool:
        """Go behind the broken value at `position`; False where its end cannot be told. Raises Undecodable."""
        while (end := skip(self.text, self.position)) is None:
            if len(self.text) - self.position > LOST or not self.more():
                return False
        self.position = end
        return True
