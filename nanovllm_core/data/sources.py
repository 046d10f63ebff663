"""What stands in `data.path`: a file, a folder with sub-folders, or a string that is neither (offered to readers).

Files come in the order of their names, folder by folder, on every machine. Hidden files and folders (a leading dot),
pipes, sockets, broken links and the output folders of runs are left out and counted. Links to folders are followed, each
folder once.

Memory holds the names of the folder that is being walked (some 70 bytes each) and 8 MB of what was found; beyond that,
what was found lies in a temporary file. Nothing is opened here but by `fingerprint`, which reads every byte (about 1
GB/s): the same content under the same names is the same data, whatever its dates. Dates and sizes tell whether a file
changed during a run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from tempfile import SpooledTemporaryFile
from typing import Protocol

from attrs import field, frozen

from nanovllm_core.contracts import Source
from nanovllm_core.data.opening import content_name
from nanovllm_core.errors import DataError
from nanovllm_core.files import LOCK

PIECE = 4 << 20  # bytes hashed between two reports of progress
KINDS = 1000  # suffixes counted by name
IN_MEMORY = 8 << 20  # bytes of what was found
ROW = struct.Struct("<qqH")  # size, modified, bytes of the path
GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class _Found(Protocol):
    """Sources that can be gone through again and again."""

    def __iter__(self) -> Iterator[Source]: ...

    def __len__(self) -> int: ...


@frozen(kw_only=True, eq=False)
class Sources:
    """The sources of a run, in order, and what was left out."""

    path: str  # what was given
    sources: _Found
    hidden: int = 0  # files and folders whose name begins with a dot
    odd: tuple[str, ...] = ()  # neither file nor folder: broken links, pipes, sockets
    outputs: tuple[str, ...] = ()  # folders that a run made: its model and checkpoints are no documents
    unreadable: tuple[tuple[str, str], ...] = ()  # folders and entries that the system does not show, and why
    suffixes: Mapping[str, int] = field(init=False)  # lower case, with the dot -> files
    bytes: int = field(init=False)

    @suffixes.default
    def _count_suffixes(self) -> Mapping[str, int]:
        found = Counter[str]()
        for source in self.sources:
            if source.exists:
                tally(found, suffix_of(source))
        return found

    @bytes.default
    def _sum_sizes(self) -> int:
        return sum(s.size for s in self.sources)

    @classmethod
    def find(cls, path: str, *, exclude: str | os.PathLike[str] | None = None) -> Sources:
        """Everything under `path`, but for the folder `exclude` (a run's own output). Raises DataError."""
        if not os.path.exists(path):
            return cls(path=path, sources=(Source(path=path, name=path, exists=False),))
        absolute = os.path.abspath(path)
        found = _Table(absolute)
        if os.path.isfile(absolute):
            found = _Table(os.path.dirname(absolute))
            found.add(os.path.basename(absolute), os.stat(absolute))
            return cls(path=path, sources=found)
        if not os.path.isdir(absolute):
            raise DataError(f"{path}: neither a file nor a folder")
        out = os.path.realpath(exclude) if exclude is not None else None
        if out == os.path.realpath(absolute):
            raise DataError(f"{path}: data.path and output_dir are the same folder; give the output one of its own")
        walk = _Walk(absolute, out)
        for name, status in walk:
            found.add(name, status)
        return cls(
            path=path,
            sources=found,
            hidden=walk.hidden,
            odd=tuple(walk.odd),
            outputs=tuple(walk.outputs),
            unreadable=tuple(walk.unreadable),
        )

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.sources)

    def __iter__(self) -> Iterator[Source]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


class _Table:
    """Files under `root` as rows of bytes, in a file once they are many."""

    def __init__(self, root: str) -> None:
        self._root, self._count = root, 0
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (lives as long as the object)

    def add(self, name: str, status: os.stat_result) -> None:
        path = os.fsencode(name)
        self._file.write(ROW.pack(status.st_size, status.st_mtime_ns, len(path)) + path)
        self._count += 1

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Source]:
        place, rows, at = 0, b"", 0
        for _ in range(self._count):
            if len(rows) - at < ROW.size + 0xFFFF:
                self._file.seek(place)  # others may be reading too
                fresh = self._file.read(1 << 18)
                place, rows, at = place + len(fresh), rows[at:] + fresh, 0
            size, modified, length = ROW.unpack_from(rows, at)
            at += ROW.size + length
            name = os.fsdecode(rows[at - length : at])
            yield Source(path=os.path.join(self._root, name), name=_shown(name), size=size, modified=modified)


class _Walk:
    """The files under a folder: path from there, status."""

    def __init__(self, root: str, out: str | None) -> None:
        self.root, self.out = root, out
        self.hidden = 0
        self.odd: list[str] = []
        self.outputs: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.seen: set[int] = set()  # folders

    def __iter__(self) -> Iterator[tuple[str, os.stat_result]]:
        stack = [("", iter(self._entries(self.root, "", os.stat(self.root))))]
        while stack:
            folder, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
            elif name.startswith("."):
                self.hidden += 1
            else:
                yield from self._entry(os.path.join(folder, name), stack)

    def _entry(self, name: str, stack: list[tuple[str, Iterator[str]]]) -> Iterator[tuple[str, os.stat_result]]:
        path = os.path.join(self.root, name)
        try:
            status = os.stat(path)
        except OSError as e:
            if e.errno in GONE:
                self.odd.append(_shown(name))
            else:
                self.unreadable.append((_shown(name), e.strerror or str(e)))
            return
        if stat.S_ISREG(status.st_mode):
            yield name, status
        elif not stat.S_ISDIR(status.st_mode):
            self.odd.append(_shown(name))
        elif os.path.realpath(path) != self.out:
            if os.path.isfile(os.path.join(path, LOCK)):
                self.outputs.append(_shown(name))
            else:
                stack.append((name, iter(self._entries(path, name, status))))

    def _entries(self, folder: str, name: str, status: os.stat_result) -> list[str]:
        key = status.st_dev << 64 | status.st_ino
        if key in self.seen and status.st_ino:
            return []
        self.seen.add(key)
        try:
            return sorted(os.listdir(folder))
        except OSError as e:
            self.unreadable.append((_shown(name) or ".", f"the folder cannot be read ({e.strerror})"))
            return []


def _shown(name: str) -> str:
    """Names are bytes on Linux; messages are text."""
    return os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")


def suffix_of(source: Source) -> str:
    """The last suffix of the name, lower case, with the dot (`.json.gz` where it is packed); empty without one."""
    name = source.name.lower()
    inner = content_name(name)
    return os.path.splitext(inner)[1] + name[len(inner) :]


def tally(counts: Counter[str], suffix: str) -> None:
    """Count a suffix; after a thousand different ones, new ones together."""
    counts[suffix if suffix in counts or len(counts) < KINDS else "(others)"] += 1


def check_unchanged(source: Source) -> None:
    """Raises DataError when the file is no longer as it was found."""
    if source.modified is None:
        return
    try:
        status = os.stat(source.path)
    except FileNotFoundError as e:
        raise DataError(f"{source.name}: cannot be read: it vanished after it was found; run again") from e
    except OSError:
        return  # told by whoever reads it
    if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
        raise DataError(
            f"{source.name}: changed while it was being read ({source.size:,} bytes before, {status.st_size:,} now); run "
            "again when nobody writes it"
        )


def fingerprint(sources: Iterable[Source], progress: Progress | None = None, *, lenient: bool = False) -> str:
    """sha256 over names and contents.

    Raises DataError for a source that is no file, a file that changed and, unless `lenient`, one that cannot be read.
    """
    done, total = 0, sum(s.size for s in sources)
    whole = hashlib.sha256()
    if progress is not None:
        progress(0, total)
    for source in sources:
        if not source.exists:
            raise DataError(f"{source.name}: is no file, so its content cannot be hashed")
        content = hashlib.sha256()
        try:
            with open(source.path, "rb") as file:
                while piece := file.read(PIECE):
                    content.update(piece)
                    done += len(piece)
                    if progress is not None:
                        progress(min(done, total), total)
        except OSError as e:
            check_unchanged(source)
            if not lenient:
                raise DataError(f"{source.name}: cannot be read ({e.strerror})") from e
            content = hashlib.sha256(b"cannot be read")
        check_unchanged(source)
        name = source.name.encode("utf-8")
        whole.update(len(name).to_bytes(8, "little") + name + content.digest())
    return whole.hexdigest()
