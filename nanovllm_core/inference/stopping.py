"""Finding where an answer's text ends, while its tokens come in one by one.

Tokens are not characters: a character may span tokens, and so may a stop text. Text is therefore taken from a window of
the last tokens and let go when it ends with a whole character; each token is decoded a few times, never the whole
answer. Where bytes never complete a character, or tokens have no text, the window stays bounded too.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm_core.contracts import Tokenizer

_UNFINISHED = "\ufffd"  # what a tokenizer makes of incomplete UTF-8
_OPEN = 3  # most bytes of a character that is not whole yet, so most signs at the end that may still change
_WINDOW = 32  # tokens; a character, even of one byte a token, is whole long before


class StopTexts:
    """Watches one answer for the first of its stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.longest = max(map(len, stop), default=0)
        self.text = ""  # so far, whole characters only
        self.window: list[
            int
        ] = []  # the last ids; some whose text is known, since decoding may depend on what precedes
        self.decoded = ""  # the text of the window
        self.known = 0  # how much of `decoded` is in `text`
        self.fresh = 0  # where in the window the ids begin that came after the last whole character

    def found(self, ids: Sequence[int]) -> str | None:
        """The text before the earliest stop text in the answer `ids`, or None. Call after each token."""
        if not self.stop:
            return None
        before = self.decoded
        decoded = self.tokenizer.decode([*self.window, ids[-1]])
        if decoded == before and not before.endswith(_UNFINISHED) and (before or len(self.window) > _WINDOW):
            return None  # a special token: no text now, and none later
        self.window.append(ids[-1])
        self.decoded = decoded
        searched = max(0, len(self.text) - self.longest + 1)
        text = self.text + decoded[self.known :]
        ends = [at for stop in self.stop if (at := text.find(stop, searched)) >= 0]
        if not decoded.endswith(_UNFINISHED):
            if len(decoded) > self.known:
                self._let_go(text, self.fresh, 0)
        elif len(self.window) > _WINDOW:
            tail = text[-_OPEN:]
            self._let_go(text, len(self.window) - _WINDOW // 2, len(tail) - len(tail.rstrip(_UNFINISHED)))
        return text[: min(ends)] if ends else None

    def _let_go(self, text: str, start: int, undecided: int) -> None:
        """Keep all of `text` but its undecided end, and the window from `start` on."""
        self.text = text[: len(text) - undecided]
        self.window = self.window[start:]
        self.fresh = len(self.window)
        self.decoded = self.tokenizer.decode(self.window)
        self.known = max(0, len(self.decoded) - undecided)
