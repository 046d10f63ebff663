"""Extractors: the text of a record, where it came from, and nothing of the record changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from nanovllm_core.contracts import Document, Record, Segment
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import Extractors
from nanovllm_core.testing.contract import Contract

ANYTHING: tuple[Any, ...] = (
    None, True, 0, -1.5, "", " \n", "text", [], ["a", 1], {}, {"": ""}, {"text": None}, {"text": 3}, {"text": ["a"]},
    {"x": {"text": "deep"}}, {"text": "", "other": "b"}, {"ключ": "значение"},
)  # fmt: skip
ROLES = (None, "user", "assistant", "system")


class ExtractorContract(Contract):
    """An extractor.

    documents: (value of a record, the text of its document)
    passed_on: values that it leaves to the next extractor (None)
    wrong: values that it must raise DataError for
    """

    kind = "extractors"
    documents: Sequence[tuple[Any, str]] = ()
    passed_on: Sequence[Any] = ()
    wrong: Sequence[Any] = ()

    def test_gives_the_text(self) -> None:
        assert self.documents, f"{type(self).__name__}: set `documents` ((value, text), ...): nothing is tested without"
        for value, text in self.documents:
            document = self.extracted(value)
            self.check(document is not None, f"{value!r} was passed on", f"its text is {text!r}")
            if document is not None:
                self.check(document.text == text, f"{value!r} gave {document.text!r}", f"its text is {text!r}")

    def test_documents_say_where_they_are_from(self) -> None:
        for value, _ in self.documents:
            document = self.extracted(value)
            where = document and (document.source, document.index)
            self.check(where == ("deep/a.jsonl", 3), f"{value!r} is said to be from {where}", "as its record says")

    def test_passes_on_only_what_is_not_its_own(self) -> None:
        for value in self.passed_on:
            document = self.extracted(value)
            self.check(document is None, f"{value!r} gave {document!r}", "None lets the next extractor try")

    def test_wrong_records_are_data_errors(self) -> None:
        for value in self.wrong:
            try:
                document = self.extracted(value)
            except DataError as e:
                self.check("deep/a.jsonl" in str(e), f"{value!r}: {e}", "a DataError names the record's place")
            else:
                self.check(False, f"{value!r} gave {document!r}", "what can have no text raises DataError")

    def test_any_value_is_answered(self) -> None:
        """A document made of segments, None, or DataError, whatever JSON a record holds."""
        for value in (*ANYTHING, *(v for v, _ in self.documents), *self.passed_on, *self.wrong):
            try:
                document = self.extracted(value)
            except DataError:
                continue
            except Exception as e:
                given = f"{value!r} raised {type(e).__name__}: {e}"
                raise AssertionError(self.told(given, "answers a Document or None, or raises DataError")) from e
            if document is None:
                continue
            self.check(isinstance(document, Document), f"{value!r} gave {document!r}", "answers a Document or None")
            segments = document.segments
            good = isinstance(segments, tuple) and all(
                isinstance(s, Segment) and isinstance(s.text, str) and s.role in ROLES for s in segments
            )
            self.check(good, f"{value!r} gave the segments {segments!r}", "segments: a tuple of Segment, roles known")

    def test_leaves_the_record_as_it_is(self) -> None:
        for value, _ in self.documents:
            given = copy.deepcopy(value)
            self.bound(Extractors).extract(record=self.record(given))
            self.check(given == value, f"{value!r} became {given!r}", "a record is not changed")

    def test_answers_the_same_again(self) -> None:
        values = [value for value, _ in self.documents]
        first = [self.extracted(v) for v in values]
        again = [self.extracted(v) for v in reversed(values)][::-1]
        self.check(first == again, f"{first} became {again}", "an answer depends on the record alone")

    def extracted(self, value: Any) -> Document | None:
        return self.bound(Extractors).extract(record=self.record(copy.deepcopy(value)))

    def record(self, value: Any) -> Record:
        return Record(value=value, source="deep/a.jsonl", line=7, index=3, byte=41)
