"""Chat templates without injected special tokens: what a message spells out of them stays plain text.

The template is rendered with a placeholder for each special token that a message spells out, and those stretches are
encoded as plain text afterwards: template logic that looks at the message (stripping, `<think>` blocks) sees everything
else as it is. The cost: merges do not cross such a stretch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanovllm_core.contracts import Tokenizer

Piece = tuple[str, bool]  # text, and whether special tokens written in it are meant (template text)


def specials_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What finds special tokens written in a text, the longest first."""
    specials = sorted(filter(None, tokenizer.special_texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, specials))) if specials else None


class Shield:
    """Hides the special tokens that the texts of one conversation spell out."""

    def __init__(self, specials: re.Pattern[str] | None, texts: Sequence[str]) -> None:
        self._specials = specials
        self._mark = "\ue0a5"  # private use: nothing that a template strips or splits at
        while any(self._mark in text for text in texts):
            self._mark += "\ue0a6"
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """The text as the template sees it."""
        return self._specials.sub(self._hide, text) if self._specials else text

    def _hide(self, found: re.Match[str]) -> str:
        self._hidden.append(found.group())
        return f"{self._mark}{len(self._hidden) - 1}{self._mark}"

    def pieces(self, rendered: str) -> list[Piece]:
        """What the template made, with the hidden texts in their places; at least one piece."""
        split = re.split(f"{self._mark}([0-9]+){self._mark}", rendered)  # template text, number, template text, ...
        pieces = [(self._hidden[int(t)], False) if n % 2 else (t, True) for n, t in enumerate(split) if t]
        return pieces or [("", True)]
