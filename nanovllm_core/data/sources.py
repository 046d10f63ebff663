"""What stands in `data.path`: a file, a folder with sub-folders, or a string that is neither (offered to readers).

Files come in the order of their names, folder by folder, on every machine. Hidden files and folders (a leading dot),
pipes, sockets, broken links and the output folders of runs are left out and counted. Links to folders are followed, each
folder once.
Nothing is opened here but by `fingerprint`, which reads every byte (about 1 GB/s): the same content under the same
names is the same data, whatever its dates.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from attrs import field, frozen

from nanovllm_core.contracts import Source
from nanovllm_core.errors import DataError
from nanovllm_core.files import LOCK

PIECE = 4 << 20  # bytes hashed between two reports of progress
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@frozen(kw_only=True, eq=False)
class Sources:
    """The sources of a run, in order, and what was left out."""

    path: str  # what was given
    sources: tuple[Source, ...]
    hidden: int = 0  # files and folders whose name begins with a dot
    odd: tuple[str, ...] = ()  # neither file nor folder: broken links, pipes, sockets
    outputs: tuple[str, ...] = ()  # folders that a run made: its model and checkpoints are no documents
    suffixes: Mapping[str, int] = field(init=False)  # lower case, with the dot -> files
    bytes: int = field(init=False)

    @suffixes.default
    def _count_suffixes(self) -> Mapping[str, int]:
        return Counter(suffix_of(s) for s in self.sources if s.exists)

    @bytes.default
    def _sum_sizes(self) -> int:
        return sum(s.size for s in self.sources)

    @classmethod
    def find(cls, path: str, *, exclude: str | os.PathLike[str] | None = None) -> Sources:
        """Everything under `path`, but for the folder `exclude` (a run's own output). Raises DataError."""
        if not os.path.exists(path):
            return cls(path=path, sources=(Source(path=path, name=path, exists=False),))
        absolute = os.path.abspath(path)
        if os.path.isfile(absolute):
            return cls(path=path, sources=(_source(absolute, os.path.basename(absolute)),))
        if not os.path.isdir(absolute):
            raise DataError(f"{path}: neither a file nor a folder")
        out = os.path.realpath(exclude) if exclude is not None else None
        if out == os.path.realpath(absolute):
            raise DataError(f"{path}: data.path and output_dir are the same folder; give the output one of its own")
        walk = _Walk(absolute, out)
        return cls(path=path, sources=tuple(walk), hidden=walk.hidden, odd=tuple(walk.odd), outputs=tuple(walk.outputs))

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.sources)

    def __iter__(self) -> Iterator[Source]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


class _Walk:
    def __init__(self, root: str, out: str | None) -> None:
        self.root, self.out = root, out
        self.hidden = 0
        self.odd: list[str] = []
        self.outputs: list[str] = []
        self.seen: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Source]:
        stack = [iter(self._entries(self.root))]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
            elif entry.name.startswith("."):
                self.hidden += 1
            elif entry.is_dir():
                if os.path.realpath(entry.path) == self.out:
                    continue
                if os.path.isfile(os.path.join(entry.path, LOCK)):
                    self.outputs.append(self._name(entry.path))
                else:
                    stack.append(iter(self._entries(entry.path)))
            elif entry.is_file():
                yield _source(entry.path, self._name(entry.path))
            else:
                self.odd.append(self._name(entry.path))

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self.seen and status.st_ino:
                return []
            self.seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda e: e.name)
        except OSError as e:
            raise DataError(f"{self._name(folder)}: the folder cannot be read ({e.strerror})") from e

    def _name(self, path: str) -> str:
        name = os.path.relpath(path, self.root).replace(os.sep, "/")
        return os.fsencode(name).decode("utf-8", "backslashreplace")  # names are bytes on Linux; messages are text


def _source(path: str, name: str) -> Source:
    return Source(path=path, name=name, size=os.stat(path).st_size)


def suffix_of(source: Source) -> str:
    """The last suffix of the name, lower case, with the dot; empty when there is none."""
    return PurePosixPath(source.name).suffix.lower()


def fingerprint(sources: Iterable[Source], progress: Progress | None = None) -> str:
    """sha256 over names and contents. Raises DataError for a file that cannot be read or a source that is no file."""
    sources = tuple(sources)
    done, total = 0, sum(s.size for s in sources)
    whole = hashlib.sha256()
    if progress is not None:
        progress(0, total)
    for source in sources:
        if not source.exists:
            raise DataError(f"{source.name}: is no file, so its content cannot be hashed")
        content = hashlib.sha256()
        try:
            with Path(source.path).open("rb") as file:
                while piece := file.read(PIECE):
                    content.update(piece)
                    done += len(piece)
                    if progress is not None:
                        progress(min(done, total), total)
        except OSError as e:
            raise DataError(f"{source.name}: cannot be read ({e.strerror})") from e
        name = source.name.encode("utf-8")
        whole.update(len(name).to_bytes(8, "little") + name + content.digest())
    return whole.hexdigest()
