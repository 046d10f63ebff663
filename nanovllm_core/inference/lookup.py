"""Guesses at an answer's next tokens: what followed the last time that its newest three stood there (Yang et al., 2023, arXiv
2304.04487; "prompt lookup").

A forward over some tokens of one sequence reads the weights once, as one over a single token does. Each guess is drawn anew from
the logits before it, with the numbers of its position, and counts where both are the same: so the answer is the one that is
made without guessing, and what was guessed wrong costs a part of a step. Texts that repeat names, quotes and lists gain most.
"""

from __future__ import annotations

from attrs import define, field

from nanovllm_core.inference.sequence import Sequence

NEWEST = 3  # tokens that must have stood there before
FEWEST = 2  # guesses at first, and after one was wrong
LONGEST = 32  # steps without a guess after many that were wrong


@define(eq=False)
class Lookup:
    """Of one sequence."""

    _tokens: list[int] = field(factory=list)
    _after: dict[tuple[int, ...], int] = field(factory=dict)  # tokens -> where the one after them stands
    _size: int = FEWEST
    _wrong: int = 0  # times in a row
    _pause: int = 0

    def guess(self, sequence: Sequence, most: int) -> list[int]:
        """What may follow, at most so many tokens."""
        tokens, begin = self._tokens, len(self._tokens)
        tokens += sequence.tokens(begin, sequence.known)
        for end in range(max(begin, NEWEST), len(tokens)):
            self._after[tuple(tokens[end - NEWEST : end])] = end
        if self._pause:
            self._pause -= 1
            return []
        at = self._after.get(tuple(tokens[-NEWEST:]))
        if at is None:
            return []
        period = len(tokens) - at  # if it goes round, the guess does too
        return [tokens[at + i % period] for i in range(min(self._size, most))]

    def told(self, guessed: int, right: int) -> None:
        """How many of the guesses were right: more of them next time, or none for a while."""
        self._size = max(FEWEST, 2 * guessed if right == guessed else right + 1)
        self._wrong = 0 if right else self._wrong + 1
        self._pause = min(2**self._wrong - 2, LONGEST) if self._wrong else 0
