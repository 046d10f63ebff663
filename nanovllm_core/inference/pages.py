"""Which pages of the cache are whose: counted references, and pages found again by what they hold.

A page is free when no sequence holds it. A full page is known by the key of its tokens and of all before them, so a
sequence that begins alike takes it as it is; a free page keeps its key until it is handed out for something else, the
one that was free longest first. Keys are cryptographic hashes: no prompt can be made to meet another's page. Everything
here is bookkeeping on the host; the memory itself is the runner's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

KEY = 16  # bytes


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: of its tokens, and of the page before it."""
    return blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=KEY).digest()


class PagePool:
    """`count` pages of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.forget()

    def forget(self) -> None:
        """All pages are free, and nothing is known of what they hold."""
        self._holders = [0] * self.count
        self._free: OrderedDict[int, None] = OrderedDict(
            (page, None) for page in range(self.count)
        )  # longest free first
        self._keys: list[bytes | None] = [None] * self.count
        self._page_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that `take` can give."""
        return len(self._free)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def take(self, after: int | None = None) -> int:
        """A free page of one's own; the one that follows page `after` in memory where that is free and holds nothing known."""
        follower = -1 if after is None else after + 1
        if follower in self._free and self._keys[follower] is None:
            del self._free[follower]
            page = follower
        else:
            page, _ = self._free.popitem(last=False)
        self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page known by this key, if any."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """One holder more of a page that is held, or is free and known."""
        self._free.pop(page, None)
        self._holders[page] += 1

    def name(self, page: int, key: bytes) -> None:
        """Make a full page known, unless another page is known by this key."""
        if key not in self._page_of and self._keys[page] is None:
            self._keys[page], self._page_of[key] = key, page

    def release(self, page: int) -> None:
        """One holder less."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None
            if self._keys[page] is None:
                self._free.move_to_end(page, last=False)  # nothing is lost with it

    def _forget(self, page: int) -> None:
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._page_of[key]
