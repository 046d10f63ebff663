"""Readers that are wrong in one way each, told by the test that is there for it; and what no component may be."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from attrs import field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Record, Refuse
from nanovllm_core.errors import DataError
from nanovllm_core.testing import ExtractorContract, ReaderContract, failures


def told(base, component, **options):
    """Names of the tests that fail for a component."""
    return set(failures(type("Kit", (base,), {"component": component, **options})))


@frozen(kw_only=True, eq=False)
class Lines:
    """Files of lines (.lines): one line, one record."""

    @hookimpl
    def probe(self, source):
        if source.exists and source.name.endswith(".lines"):
            return Accept(why=".lines file")
        return Refuse("not a .lines file")

    @hookimpl
    def read(self, source):
        return self.records(source)

    def records(self, source):
        byte = 0
        with open(source.path, "rb") as file:
            for index, line in enumerate(file):
                yield self.record(source, index, byte, self.text(source, line))
                byte += len(line)

    def text(self, source, line):
        try:
            return line.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as e:
            raise DataError(f"{source.name}: not UTF-8 ({e.reason})") from e

    def record(self, source, index, byte, text):
        return Record(value=text, source=source.name, line=index + 1, index=index, byte=byte)


class DropsTheLast(Lines):
    def records(self, source):
        held = None
        for record in super().records(source):
            if held is not None:
                yield held
            held = record


class ClaimsEveryFile(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="why not") if source.exists else Refuse("no file")


class ClaimsWhatIsNotThere(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="by name") if source.name.endswith(".lines") else Refuse("another name")


class OpensWhatIsNotThere(Lines):
    @hookimpl
    def probe(self, source):
        with open(source.path, "rb") as file:
            begins = file.read(4)
        return Accept(why="by name") if begins and source.name.endswith(".lines") else Refuse("another name")


class ReadsAllInProbe(Lines):
    @hookimpl
    def probe(self, source):
        if not source.exists or not source.name.endswith(".lines"):
            return Refuse("not a .lines file")
        with open(source.path, "rb") as file:
            lines = sum(1 for _ in file)
        return Accept(why=f"{lines} lines")


class RefusesWithoutAReason(Lines):
    @hookimpl
    def probe(self, source):
        return Accept(why="ok") if source.exists and source.name.endswith(".lines") else Refuse("")


class CountsFromOne(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index + 1, byte, text)


class StandsNowhere(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index, -byte, text)


class SaysThePath(Lines):
    def record(self, source, index, byte, text):
        return Record(value=text, source=source.path, line=index + 1, index=index, byte=byte)


class GivesBytes(Lines):
    def record(self, source, index, byte, text):
        return super().record(source, index, byte, (text, index))


class RaisesWhatItMeets(Lines):
    def text(self, source, line):
        return line.decode("utf-8").rstrip("\n")


class NamesNoSource(Lines):
    def text(self, source, line):
        try:
            return line.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as e:
            raise DataError("not UTF-8") from e


class GivesAList(Lines):
    @hookimpl
    def read(self, source):
        return list(self.records(source))


class ReadsBeforeItIsAsked(Lines):
    @hookimpl
    def read(self, source):
        with open(source.path, "rb") as file:
            file.read()
        return self.records(source)


class LeavesFilesOpen(Lines):
    def records(self, source):
        byte = 0
        for index, line in enumerate(open(source.path, "rb")):  # noqa: SIM115
            yield self.record(source, index, byte, self.text(source, line))
            byte += len(line)


class WritesBeside(Lines):
    def records(self, source):
        with open(source.path + ".index", "w") as file:
            file.write("seen")
        return super().records(source)


@frozen(kw_only=True, eq=False)
class ReadsOnce(Lines):
    """Keeps what it read, as an iterator."""

    _kept: dict = field(factory=dict, init=False)

    def records(self, source):
        return self._kept.setdefault(source.path, super().records(source))


@frozen(kw_only=True, eq=False)
class SharesItsPlace(Lines):
    """Counts records of all readings together."""

    _count: Counter = field(factory=Counter, init=False)

    def records(self, source):
        self._count.clear()
        for record in super().records(source):
            yield super().record(source, self._count["records"], record.byte, record.value)
            self._count["records"] += 1


TWICE = {"test_reads_the_same_twice", "test_two_readings_go_on_side_by_side"}
READERS = {
    Lines: set(),
    DropsTheLast: {"test_gives_every_record"},
    ClaimsEveryFile: {"test_refuses_other_files"},
    ClaimsWhatIsNotThere: {"test_refuses_what_does_not_exist"},
    OpensWhatIsNotThere: {"test_refuses_what_does_not_exist"},
    ReadsAllInProbe: {"test_probe_reads_first_bytes_only"},
    RefusesWithoutAReason: {"test_refuses_other_files", "test_refuses_what_does_not_exist"},
    CountsFromOne: {"test_records_say_where_they_stand"},
    StandsNowhere: {"test_records_say_where_they_stand"},
    SaysThePath: {"test_records_say_where_they_stand"},
    GivesBytes: {"test_records_say_where_they_stand", "test_gives_every_record"},
    RaisesWhatItMeets: {"test_broken_files_are_data_errors", "test_damaged_files_raise_nothing_else"},
    NamesNoSource: {"test_broken_files_are_data_errors", "test_damaged_files_raise_nothing_else"},
    GivesAList: {"test_reads_as_records_are_asked_for"},
    ReadsBeforeItIsAsked: {"test_reads_as_records_are_asked_for"},
    LeavesFilesOpen: {"test_closes_what_it_opens"},
    WritesBeside: {"test_leaves_the_files_as_they_are"},
    ReadsOnce: TWICE,
    SharesItsPlace: {"test_two_readings_go_on_side_by_side"},
}


@pytest.mark.parametrize("cls", READERS, ids=lambda c: c.__name__)
def test_readers(cls):
    files = {"a.lines": b"one\ntwo\nthree\nfour\nfive", "deep/b.lines": "zwölf\n".encode()}
    found = told(
        ReaderContract,
        cls(),
        files=files,
        records={"a.lines": ["one", "two", "three", "four", "five"], "deep/b.lines": ["zwölf"]},
        broken={"c.lines": b"\xff\n"},
    )
    if cls is GivesAList:
        assert READERS[cls] <= found
    else:
        assert found - {"test_has_a_summary"} == READERS[cls]


# ---------------------------------------------------------------- what all kinds share


def test_what_every_component_keeps():
    @frozen(kw_only=True, eq=False)
    class Undocumented(Lines):
        """Lines.

        first: where to begin
        """

        first: int = 0
        last: int = 3

    @frozen(kw_only=True, eq=False)
    class Coerced(Lines):
        """Lines.

        first: where to begin
        """

        first: int = 2.5

    @frozen(kw_only=True)
    class ByValue(Lines):
        """Lines."""

    @frozen(kw_only=True, eq=False)
    class Yields(Lines):
        """Lines."""

        @hookimpl
        def read(self, source):
            yield from self.records(source)

    @frozen(kw_only=True, eq=False)
    class Misspelt(Lines):
        """Lines."""

        @hookimpl
        def reed(self, source): ...

    files = {"a.lines": b"one\n"}
    for cls, test in (
        (Undocumented, "test_options_are_documented"),
        (Coerced, "test_options_can_be_written_in_a_recipe"),
        (ByValue, "test_follows_its_spec"),
        (Yields, "test_follows_its_spec"),
        (Misspelt, "test_follows_its_spec"),
        (DropsTheLast, "test_has_a_summary"),
    ):
        assert told(ReaderContract, cls(), files=files) == {test}, cls


def test_heavy_imports_at_load(tmp_path, monkeypatch):
    (tmp_path / "heavy_reader.py").write_text(
        "import numpy\nfrom attrs import frozen\nfrom nanovllm_core import hookimpl\n"
        "@frozen(kw_only=True, eq=False)\nclass Heavy:\n    'Heavy.'\n"
        "    @hookimpl\n    def extract(self, record): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from heavy_reader import Heavy
    finally:
        sys.modules.pop("heavy_reader", None)
    found = failures(type("Kit", (ExtractorContract,), {"component": Heavy(), "documents": [("a", "a")]}))
    assert "importing heavy_reader imports numpy" in found["test_loads_without_heavy_imports"]
    assert "Heavy" in found["test_gives_the_text"]
