"""The file of answers: appended to as they are made, one whole line each; put in the input's order when all are there.

Beside `out.jsonl` stands `out.jsonl.run.json`, which says what it was begun with, so that the answers alone are in the file.
A killed process leaves whole lines and at most a torn last one, which is cut. Lines reach the disk every few seconds:
that is what a power cut may take. Of each answer only where its line begins is kept in memory: 8 bytes.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanovllm_core.errors import OutputError
from nanovllm_core.files import finite, read_json, replace_text, sync, writing

FORMAT = 1
SYNCED = 5.0  # seconds
# some tools take them for line ends
BREAKS = MappingProxyType({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})
MISSING = -1


class Answers:
    """The answers of `count` prompts in a file that this process holds."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self.at = array("q", [MISSING]) * count  # index -> where its line begins
        self.done = 0  # answers that are there
        self.cut = 0  # bytes of a torn line that were cut
        self._end = 0
        self._synced = time.monotonic()
        self._handle = -1

    @property
    def complete(self) -> bool:
        return self.done == self.count

    @contextmanager
    def opened(self) -> Iterator[Answers]:
        """Find what is there, and append; the file is made with the first answer. Raises OutputError for lines that no run
        wrote."""
        try:
            if self.path.exists():
                self._open()
                self._find()
            yield self
        finally:
            if self._handle >= 0:
                os.close(self._handle)

    def _open(self) -> None:
        with writing(self.path):
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def missing(self, index: int) -> bool:
        return self.at[index] == MISSING

    def add(self, lines: Sequence[tuple[int, bytes]]) -> None:
        """Append the lines of answers, whole."""
        if self._handle < 0:
            self._open()
            sync(self.path.parent)
        with writing(self.path):
            self._write(b"".join(line for _, line in lines))
            for index, line in lines:
                self._take(index, line)
            if time.monotonic() - self._synced > SYNCED:
                os.fsync(self._handle)
                self._synced = time.monotonic()

    def finish(self) -> None:
        """All are there: put them in the order of the input, at once."""
        assert self.complete
        try:
            with writing(self.path):
                os.fsync(self._handle)
                if any(a > b for a, b in zip(self.at, self.at[1:], strict=False)):
                    self._sort()
        except OutputError as e:
            raise OutputError(
                f"{e}: all {self.count:,} answers are there, but not in the order of the input; the same command tries again"
            ) from e

    def _sort(self) -> None:
        aside = self.path.with_name(f".{self.path.name}.partial")
        with self.path.open("rb") as old, aside.open("wb") as new:
            for begin in self.at:
                old.seek(begin)
                new.write(old.readline())
        os.chmod(aside, self.path.stat().st_mode & 0o777)
        sync(aside)
        os.replace(aside, self.path)
        sync(self.path.parent)

    def _write(self, data: bytes) -> None:
        while data:  # the system may take a part; a line that is torn here is cut by the next run
            data = data[os.write(self._handle, data) :]

    def _take(self, index: int, line: bytes) -> None:
        self.at[index] = self._end
        self._end += len(line)
        self.done += 1

    def _find(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                whole = line.endswith(b"\n")
                index, wrong = self._index(line)
                if wrong and not whole:
                    with writing(self.path):
                        os.ftruncate(self._handle, self._end)
                        os.fsync(self._handle)
                    self.cut = len(line)
                    return
                if wrong:
                    raise OutputError(
                        f"{self.path}:{number}: {wrong}; take that line out, and the same command answers what is missing"
                    )
                self._take(index, line if whole else line + b"\n")
                if not whole:
                    with writing(self.path):
                        self._write(b"\n")
                    return

    def _index(self, line: bytes) -> tuple[int, str]:
        """Which prompt a line answers, or what is wrong with it."""
        try:
            index = json.loads(line)["index"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return 0, "is no answer that a run wrote"
        if type(index) is not int or not 0 <= index < self.count:
            return 0, f"index: got {str(index)[:40]}, allowed: 0 to {self.count - 1}"
        return index, "" if self.missing(index) else f"index {index}: has an answer already"


def line_of(told: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]) -> bytes:
    """The line of one prompt's answers: of a single one its keys, of several a list in `answers`."""
    answer = outputs[0] if len(outputs) == 1 else {"answers": list(outputs)}
    line = {**told, **answer}
    try:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a log-probability of minus infinity
        text = json.dumps(finite(line), ensure_ascii=False, allow_nan=False)
    return text.translate(BREAKS).encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate: a JSON escape


# ---------------------------------------------------------------- what it was begun with


def beside(out: Path) -> Path:
    """The file that says what a file of answers was begun with."""
    return out.with_name(f"{out.name}.run.json")


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes from the file. Raises OutputError when one has it, or it cannot be used."""
    from filelock import FileLock, Timeout

    if out.exists() and not out.is_file():
        raise OutputError(f"--out: got {out}, which is no file; name one, or leave --out out to print the answers")
    if not out.parent.is_dir():
        raise OutputError(f"--out: got {out}, and there is no folder {out.parent}; make it, or name another file")
    name = out.with_name(f".{out.name}.lock")
    lock = FileLock(name)
    try:
        with writing(out):
            lock.acquire(timeout=0)
    except (Timeout, OutputError) as e:
        if isinstance(e, OutputError) and not isinstance(e.__cause__, Timeout):
            raise
        raise OutputError(f"{out}: another process is writing there; wait for it or name another --out") from e
    try:
        yield
        with suppress(OSError):
            name.unlink()  # all is done: whoever comes now changes nothing
    finally:
        lock.release()


def begun(out: Path) -> dict[str, Any] | None:
    """What the answers in `out` were begun with; None where there are none. Raises OutputError when nobody can tell."""
    told = beside(out)
    if not out.exists() or not out.stat().st_size:
        return None
    try:
        found = read_json(told)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
    except FileNotFoundError:
        raise OutputError(
            f"{out}: holds something and there is no {told.name} beside it, so no run of `nanovllm generate` made it; name "
            "another --out, or take it away"
        ) from None
    except (OSError, ValueError) as e:
        raise OutputError(f"{told}: cannot be used ({e}); name another --out, or take both files away") from e
    return found


def begin(out: Path, told: Mapping[str, Any]) -> None:
    """Say what the answers are begun with."""
    with writing(beside(out)):
        replace_text(beside(out), json.dumps({"format": FORMAT, **told}, indent=1) + "\n")


def refuse_other(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises OutputError where a run would go on with something else than what it was begun with."""
    old, new = _leaves(there), _leaves(here)
    lines = [f"\n  {key}: {_said(old.get(key))} then, {_said(new[key])} now" for key in new if old.get(key) != new[key]]
    if lines:
        raise OutputError(
            f"{out}: was begun with something else; make it the same, name another --out, or take {out.name} and "
            f"{beside(out).name} away to begin anew:{''.join(lines)}"
        )


def _leaves(told: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in told.items():
        found |= _leaves(value, f"{key}{name}.") if isinstance(value, Mapping) else {f"{key}{name}": value}
    return found


def _said(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
