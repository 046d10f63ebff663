"""Extractors that are wrong in one way each, told by the test that is there for it."""

from __future__ import annotations

import pytest
from attrs import field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Document, Segment
from nanovllm_core.errors import DataError
from nanovllm_core.testing import ExtractorContract, failures


@frozen(kw_only=True, eq=False)
class Words:
    """The text under `words`."""

    @hookimpl
    def extract(self, record):
        if not isinstance(record.value, dict):
            return None
        if not isinstance(record.value.get("words"), str):
            raise DataError(f"{record.place}: no words")
        return Document(segments=self.segments(record), source=record.source, index=self.index(record))

    def segments(self, record):
        return (Segment(record.value["words"]),)

    def index(self, record):
        return record.index


class Strips(Words):
    def segments(self, record):
        return (Segment(record.value["words"].strip()),)


class LosesTheIndex(Words):
    def index(self, record):
        return 0


class Pops(Words):
    def segments(self, record):
        return (Segment(record.value.pop("words")),)


class GivesAListOfSegments(Words):
    def segments(self, record):
        return [Segment(record.value["words"])]


class KeyErrors(Words):
    @hookimpl
    def extract(self, record):
        return Document(segments=self.segments(record), source=record.source, index=record.index)


class PassesAllOn(Words):
    @hookimpl
    def extract(self, record):
        try:
            return super().extract(record)
        except DataError:
            return None


@frozen(kw_only=True, eq=False)
class Remembers(Words):
    """Joins what it saw before."""

    _seen: list = field(factory=list, init=False)

    def segments(self, record):
        self._seen.append(record.value["words"])
        return (Segment(record.value["words"], trained=len(self._seen) < 4),)


EXTRACTORS = {
    Words: set(),
    Strips: {"test_gives_the_text"},
    LosesTheIndex: {"test_documents_say_where_they_are_from"},
    Pops: {"test_leaves_the_record_as_it_is"},
    GivesAListOfSegments: {"test_any_value_is_answered"},
    KeyErrors: {"test_any_value_is_answered", "test_wrong_records_are_data_errors", "test_passes_on_only_what_is_not_its_own"},
    PassesAllOn: {"test_wrong_records_are_data_errors"},
    Remembers: {"test_answers_the_same_again"},
}  # fmt: skip


@pytest.mark.parametrize("cls", EXTRACTORS, ids=lambda c: c.__name__)
def test_extractors(cls):
    class Kit(ExtractorContract):
        component = cls()
        documents = [({"words": " a "}, " a "), ({"words": "b"}, "b")]
        passed_on = ["text", 3]
        wrong = [{}, {"words": 3}]

    assert set(failures(Kit)) - {"test_has_a_summary"} == EXTRACTORS[cls]
