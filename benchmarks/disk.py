"""A disk that loses power: what a log of file operations may have left, where fsync alone makes anything last.

Pessimistic beyond any one file system, and so good for all of them:
- a file's bytes since its last fsync: none of them, any length of them, zeros in their place, or an older version;
- an entry of a folder (made, renamed, removed) since the folder's last fsync: each is kept or lost by itself, so later
  ones may last where earlier ones do not; a rename is one change in both folders;
- what lies in a folder whose own entry is lost is lost with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

Entry = tuple[str, Any]  # an operation and its arguments, as `Recorder` writes them


@define(eq=False)
class File:
    """`durable`: what an fsync has secured (None: nothing yet); `since`: each content after that, in order."""

    durable: bytes | None = None
    since: list[bytes] = field(factory=list)

    @property
    def now(self) -> bytes:
        return self.since[-1] if self.since else self.durable or b""


@define(eq=False)
class Folder:
    """Entries as they are now, and as they are on disk."""

    now: dict[str, Any] = field(factory=dict)
    durable: dict[str, Any] = field(factory=dict)


@define(eq=False)
class Change:
    """A change of entries that no fsync has secured: [(folder, name, what is there then or None)]."""

    parts: list[tuple[Folder, str, Any]]


@define(eq=False)
class Disk:
    """Follows a log; `crash` gives one state that a loss of power may leave."""

    top: Folder = field(factory=Folder)
    pending: list[Change] = field(factory=list)
    told: int = 0  # the newest checkpoint of which callbacks have heard

    def do(self, operation: str, *arguments: Any) -> None:
        """One operation of the log."""
        getattr(self, operation)(*arguments)

    def mkdir(self, path: str) -> None:
        self._change((path, Folder()))

    def write(self, path: str, content: bytes) -> None:
        folder, name = self._at(path)
        if name not in folder.now:
            self._change((path, File()))
        folder.now[name].since.append(content)

    def rename(self, source: str, target: str) -> None:
        folder, name = self._at(source)
        self._change((source, None), (target, folder.now[name]))

    def remove(self, path: str) -> None:
        self._change((path, None))

    def fsync(self, path: str) -> None:
        if path == ".":
            node = self.top
        else:
            folder, name = self._at(path)
            node = folder.now[name]
        if isinstance(node, File):
            node.durable, node.since = node.now, []
            return
        for change in [c for c in self.pending if any(f is node for f, _, _ in c.parts)]:
            self._secure(change)

    def saved(self, step: int) -> None:
        self.told = step

    def _at(self, path: str) -> tuple[Folder, str]:
        folder, (*above, name) = self.top, Path(path).parts
        for part in above:
            folder = folder.now[part]
        return folder, name

    def _change(self, *parts: tuple[str, Any]) -> None:
        change = Change([(*self._at(path), node) for path, node in parts])
        for folder, name, node in change.parts:
            if node is None:
                del folder.now[name]
            else:
                folder.now[name] = node
        self.pending.append(change)

    def _secure(self, change: Change) -> None:
        self.pending.remove(change)
        _apply([change], {id(f): f.durable for f, _, _ in change.parts})

    def crash(self, draw: random.Random) -> dict[str, bytes | None]:
        """Path -> content, or None for a folder."""
        keep = draw.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        kept = [change for change in self.pending if draw.random() < keep]
        entries: dict[int, dict[str, Any]] = {}
        for change in kept:
            for folder, _, _ in change.parts:
                entries.setdefault(id(folder), dict(folder.durable))
        _apply(kept, entries)
        left: dict[str, bytes | None] = {}
        whole = draw.random() < 0.2  # the bytes had luck, the entries may not have had

        def walk(folder: Folder, path: str) -> None:
            for name, node in entries.get(id(folder), folder.durable).items():
                place = f"{path}{name}"
                if isinstance(node, Folder):
                    left[place] = None
                    walk(node, f"{place}/")
                else:
                    left[place] = node.now if whole else _torn(node, draw)

        walk(self.top, "")
        return left


def _apply(changes: Sequence[Change], entries: dict[int, dict[str, Any]]) -> None:
    for change in changes:
        for folder, name, node in change.parts:
            if node is None:
                entries[id(folder)].pop(name, None)
            else:
                entries[id(folder)][name] = node


def _torn(file: File, draw: random.Random) -> bytes:
    """What may be left of a file's bytes."""
    if not file.since:
        return file.durable or b""
    durable = file.durable or b""
    content = draw.choice([durable, *file.since])
    begin = len(durable) if content.startswith(durable) else 0  # what is appended harms nothing before it
    cut = draw.randint(begin, len(content))
    match draw.randrange(5):
        case 0:
            return content[:cut]
        case 1:
            return content[:cut] + bytes(len(content) - cut)
        case 2:
            return content[:begin] + bytes(cut - begin) + content[cut:]
        case 3:
            return content[:begin]
    return content
