"""Readers: which sources they take, and that every record comes, in its place, whatever the file holds."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanovllm_core.contracts import Accept, Damage, Record, Refuse, Source
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import Readers
from nanovllm_core.testing.contract import Contract
from nanovllm_core.testing.reading import bytes_read, padded

FOREIGN: Mapping[str, bytes] = MappingProxyType(
    {
        "image.png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        "archive.zip": b"PK\x03\x04\x14\x00\x00\x00",
        "program.exe": b"MZ\x90\x00\x03\x00\x00\x00",
        "noise.unheard-of": bytes(random.Random(0).randbytes(400)),
        "no-suffix": b"",
    }
)
FIRST_BYTES = 1 << 20  # what a probe may look at, and what a call of `read` may before a record is asked for
DAMAGES = 40  # of each file


class ReaderContract(Contract):
    """A reader.

    files: name -> content that it must accept and read; names may have folders in them
    records: name -> the values of that file's records, in order
    refused: name -> content that it must refuse, beside what the kit adds
    broken: name -> content that `read` must raise DataError for, naming the source
    strings: what `data.path` may hold that is no file -> the values of its records
    """

    kind = "readers"
    files: Mapping[str, bytes] = MappingProxyType({})
    records: Mapping[str, Sequence[Any]] = MappingProxyType({})
    refused: Mapping[str, bytes] = MappingProxyType({})
    broken: Mapping[str, bytes] = MappingProxyType({})
    strings: Mapping[str, Sequence[Any]] = MappingProxyType({})

    # ------------------------------------------------------------ probe

    def test_accepts_its_files(self, tmp_path: Path) -> None:
        for folder in ("", "spaß und #100%/漢 字"):
            for source in self.written(tmp_path, {f"{folder}/{n}".lstrip("/"): c for n, c in self.files.items()}):
                self.judged(source, Accept)
        for source in self.named():
            self.judged(source, Accept)

    def test_refuses_other_files(self, tmp_path: Path) -> None:
        own = {Path(name).suffix.lower() for name in self.files}
        foreign = {n: c for n, c in FOREIGN.items() if Path(n).suffix not in own}
        for source in self.written(tmp_path, {**foreign, **self.refused}):
            self.judged(source, Refuse)

    def test_refuses_what_does_not_exist(self, tmp_path: Path) -> None:
        """A source with `exists` false is a string in `data.path`; it may look like the name of a file."""
        for name in ("no such place", *self.files):
            if name not in self.strings:
                self.judged(Source(path=name, name=name, exists=False), Refuse)

    def test_probe_reads_first_bytes_only(self, tmp_path: Path) -> None:
        hooks = self.bound(Readers)
        for name, content in self.files.items():
            source = padded(tmp_path, name, content)
            hooks.probe(source=source)  # what it imports is not the file's
            read = bytes_read(lambda s=source: hooks.probe(source=s))  # type: ignore[misc]
            self.check(
                read <= FIRST_BYTES,
                f"probe read {read:,} bytes of {name}, {source.size:,} bytes long",
                f"a probe looks at no more than first bytes ({FIRST_BYTES:,})",
            )

    # ------------------------------------------------------------ read

    def test_reads_as_records_are_asked_for(self, tmp_path: Path) -> None:
        hooks = self.bound(Readers)
        for name, content in self.files.items():
            source = padded(tmp_path, name, content)
            found = hooks.read(source=source)
            self.check(
                isinstance(found, Iterator), f"read gave {type(found).__name__}", "read returns an iterator of Record"
            )
            read = bytes_read(lambda s=source: hooks.read(source=s))  # type: ignore[misc]
            self.check(
                read <= FIRST_BYTES,
                f"read went through {read:,} bytes of {name} before a record was asked for",
                "read returns an iterator at once; the source is read while it is walked",
            )

    def test_gives_every_record(self, tmp_path: Path) -> None:
        unknown = sorted(set(self.records) - set(self.files))
        self.check(not unknown, f"`records` names {unknown}, which `files` does not hold", "files holds their content")
        for source in self.sources(tmp_path):
            expected = self.strings.get(source.name, self.records.get(source.name))
            found = [record.value for record in self.read(source)]
            if expected is not None:
                self.check(
                    found == list(expected),
                    f"{source.name} gave {_short(found)}, expected {_short(list(expected))}",
                    "every record of a source comes, in order, as it stands there",
                )

    def test_records_say_where_they_stand(self, tmp_path: Path) -> None:
        for source in self.sources(tmp_path):
            byte, line = 0, 1
            for index, record in enumerate(self.read(source)):
                told = f"record {index} of {source.name} says"
                self.check(isinstance(record, Record), f"{source.name} gave {type(record)}", "read gives Records")
                self.check(record.source == source.name, f"{told} source {record.source!r}", "source is Source.name")
                self.check(record.index == index, f"{told} index {record.index}", "index counts from 0 without a gap")
                here = byte <= record.byte <= max(source.size, byte)
                self.check(here, f"{told} byte {record.byte}", "byte does not fall and lies within the source")
                self.check(
                    record.line is None or record.line >= line, f"{told} line {record.line}", "line rises from 1"
                )
                self.check(_is_json(record.value), f"{told} {_short(record.value)}", "a value is a string or JSON")
                byte, line = record.byte, record.line or line

    def test_reads_the_same_twice(self, tmp_path: Path) -> None:
        for source in self.sources(tmp_path):
            once, again = self.read(source), self.read(source)
            self.check(once == again, f"{source.name} read twice differs", "two reads give the same records")

    def test_two_readings_go_on_side_by_side(self, tmp_path: Path) -> None:
        hooks = self.bound(Readers)
        sources = self.sources(tmp_path)
        alone = [self.read(source) for source in sources]
        running = [hooks.read(source=source) for source in sources]
        found: list[list[Record]] = [[] for _ in sources]
        for _ in range(max(map(len, alone), default=0) + 1):  # in turn, one record at a time
            for i, iterator in enumerate(running):
                found[i] += [_sound(record) for record in [next(iterator, None)] if record is not None]
        for source, whole, mixed in zip(sources, alone, found, strict=True):
            self.check(whole == mixed, f"{source.name} read beside others differs", "readings share no state")

    # ------------------------------------------------------------ bad files

    def test_broken_files_are_data_errors(self, tmp_path: Path) -> None:
        for source in self.written(tmp_path, self.broken):
            told = self.trouble(source)
            self.check(bool(told), f"{source.name} is broken and was read", "what cannot be read raises DataError")

    def test_damaged_files_raise_nothing_else(self, tmp_path: Path) -> None:
        """Cut short, empty, or with bytes overwritten: records, or DataError, never another exception."""
        draw = random.Random(7)
        for name, content in self.files.items():
            variants = [b"", content[: len(content) // 2], content[:-1], content + b"\x00", b"\xff\xfe" + content]
            while content and len(variants) < DAMAGES:
                bad = bytearray(content)
                for _ in range(draw.randint(1, 3)):
                    bad[draw.randrange(len(bad))] = draw.choice([0, 10, 13, 34, 44, 91, 92, 123, 128, 237, 255])
                variants.append(bytes(bad[: draw.choice([len(bad), draw.randint(0, len(bad))])]))
            for variant in variants:
                source = self.written(tmp_path, {name: variant})[0]
                if isinstance(self.verdict(name, self.bound(Readers).probe, source=source), Accept):
                    self.trouble(source)

    # ------------------------------------------------------------ files

    def test_closes_what_it_opens(self, tmp_path: Path) -> None:
        hooks = self.bound(Readers)
        for source in self.sources(tmp_path):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for _ in hooks.read(source=source):
                    pass
                next(hooks.read(source=source), None)  # given up after the first record
                gc.collect()
            left = [str(w.message) for w in told if issubclass(w.category, ResourceWarning)]
            self.check(not left, f"reading {source.name}: {'; '.join(left)}", "files are closed when a reading ends")

    def test_leaves_the_files_as_they_are(self, tmp_path: Path) -> None:
        sources = self.written(tmp_path, self.files)
        hooks = self.bound(Readers)
        before = _state(tmp_path)
        for source in sources:
            hooks.probe(source=source)
            self.read(source)
        self.check(_state(tmp_path) == before, "files changed while they were read", "a reader writes nothing")

    # ------------------------------------------------------------ helpers

    def written(self, folder: Path, files: Mapping[str, bytes]) -> list[Source]:
        """The files on disk, as the sources that a run would make of them."""
        sources = []
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sources.append(Source(path=str(path), name=name, size=len(content)))
        return sources

    def named(self) -> list[Source]:
        return [Source(path=text, name=text, exists=False) for text in self.strings]

    def sources(self, folder: Path) -> list[Source]:
        """Everything that the reader must read."""
        found = [*self.written(folder, self.files), *self.named()]
        assert found, f"{type(self).__name__}: set `files` (name -> content), or `strings`: nothing is tested without"
        return found

    def read(self, source: Source) -> list[Record]:
        """The source's records; a Damage among them counts as the DataError that another reader would raise."""
        return [_sound(found) for found in self.bound(Readers).read(source=source)]

    def judged(self, source: Source, wanted: type) -> None:
        given = f"{'file' if source.exists else 'the string'} {source.name!r}"
        answer = self.verdict(given, self.bound(Readers).probe, source=source)
        rule = "it takes what it can read" if wanted is Accept else "it refuses what is not its own"
        self.check(isinstance(answer, wanted), f"{given}: probe answered {answer}", rule)

    def trouble(self, source: Source) -> str:
        """The DataError that reading ends in, or nothing."""
        try:
            self.read(source)
        except DataError as e:
            self.check(source.name in str(e), f"{source.name}: {e}", "a DataError names the source")
            return str(e)
        except Exception as e:
            content = Path(source.path).read_bytes()
            given = f"{source.name} holding {_short(content)} raised {type(e).__name__}: {e}"
            raise AssertionError(self.told(given, "what cannot be read raises DataError")) from e
        return ""


def _sound(found: Record | Damage) -> Record:
    if isinstance(found, Damage):
        raise DataError(found.message)
    return found


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    return value is None or isinstance(value, str | int | float | bool)


def _state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
