"""An answer's text while its tokens come in one by one, and where it ends.

Tokens are not characters: a character may span tokens, and so may a stop text. Text is therefore taken from a growing
window of tokens and let go only when it ends with a whole character; each token is decoded a few times, never the whole
answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm_core.contracts import Tokenizer

_UNFINISHED = "\ufffd"  # what a tokenizer makes of incomplete UTF-8
_MOST = 8  # tokens that end with what is unfinished, after which the first of them are let go
_LONGEST = 4  # tokens of a character that have a text: it has at most four bytes


class GrowingText:
    """The text of tokens that come in one after another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = ""  # so far, whole characters only
        self.shown = 0  # ids whose text is in `text`
        self.start = 0  # where the window begins: some ids before `shown`, since decoding may depend on what precedes
        self.seen = 0  # ids that were looked at

    def grow(self, ids: Sequence[int]) -> str:
        """The text of all `ids`, which begin as before; its end may be part of a character."""
        text = self.text
        for end in range(
            min(self.seen + 1, len(ids)), len(ids) + 1
        ):  # one by one: what is unfinished may be so for some
            text = self._grow(ids, end)
        self.seen = len(ids)
        return text

    def _grow(self, ids: Sequence[int], end: int) -> str:
        """The text of the first `end` ids."""
        known = self.tokenizer.decode(ids[self.start : self.shown])
        window = self.tokenizer.decode(ids[self.start : end])
        if len(window) <= len(known):
            if window == known:  # of tokens without a text
                self.start, self.shown = self.shown, end
            return self.text
        text = self.text + window[len(known) :]
        if not window.endswith(_UNFINISHED):
            self.text, self.start, self.shown = text, self.shown, end
        elif end - self.shown > _MOST:  # bytes that are no text; the last ones may yet be
            settled, left = end, _LONGEST
            while left and settled > self.shown:
                settled -= 1
                left -= self.tokenizer.decode([ids[settled]]) != ""
            for cut in range(settled, self.shown, -1):
                part = self.tokenizer.decode(ids[self.start : cut])
                if len(part) > len(known) and window.startswith(part):  # no character stands across the cut
                    self.text, self.start, self.shown = self.text + part[len(known) :], self.shown, cut
                    break
        return text


class StopTexts:
    """Watches one answer for the first of its stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stop = stop
        self.longest = max(map(len, stop), default=0)
        self.growing = GrowingText(tokenizer)

    def found(self, ids: Sequence[int]) -> str | None:
        """The text before the earliest stop text in the answer `ids`, or None. Call after each token."""
        if not self.stop:
            return None
        searched = max(0, len(self.growing.text) - self.longest + 1)
        text = self.growing.grow(ids)
        ends = [at for stop in self.stop if (at := text.find(stop, searched)) >= 0]
        return text[: min(ends)] if ends else None

    def held_back(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop text."""
        for count in range(min(self.longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self.stop):
                return count
        return 0
