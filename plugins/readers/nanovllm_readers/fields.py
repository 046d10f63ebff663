"""Which text a record holds, by the names of its fields.

In order, the first that fits: a string is the text; `text`, `content`, `body`; a question and its answer (`input` and
`output`), of which the answer alone is trained; else every string field, joined by newlines, in the record's order.
A string of white space alone counts as absent throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from nanovllm_core.contracts import Document, Record, Segment
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl


def _filled(value: Any) -> bool:
    return isinstance(value, str) and not value.isspace() and value != ""


@frozen(kw_only=True, eq=False)
class Fields:
    """Finds the text by field name: text, content, body; then input + output; then all string fields.

    fields: names that hold a whole document; the first that holds text is taken
    prompt: name of the field that is read but not trained; it needs the answer's field beside it
    answer: name of the field that is trained after the prompt
    chat: frame prompt and answer by the tokenizer's chat template if it has one; false joins them by a newline
    """

    fields: tuple[str, ...] = ("text", "content", "body")
    prompt: str = "input"
    answer: str = "output"
    chat: bool = True

    @hookimpl
    def extract(self, record: Record) -> Document | None:
        """The record's document, perhaps an empty one. Raises DataError when the record has no string."""
        value = record.value
        if isinstance(value, str):
            segments = (Segment(value),)
        elif isinstance(value, Mapping):
            segments = self._of_object(record, value)
        else:
            raise DataError(
                f"{_place(record)}: the record is {_kind(value)}; allowed: a string, or an object with text"
            )
        return Document(segments=segments, source=record.source, index=record.index)

    def _of_object(self, record: Record, value: Mapping[str, Any]) -> tuple[Segment, ...]:
        for name in self.fields:
            if _filled(value.get(name)):
                return (Segment(value[name]),)
        prompt, answer = value.get(self.prompt), value.get(self.answer)
        if _filled(prompt) and self.answer in value:  # a prompt is never trained, whatever its answer is
            if answer is None:
                answer = ""
            if not isinstance(answer, str):
                raise DataError(f"{_place(record)}: `{self.answer}` is {_kind(answer)}, expected a string")
            roles = ("user", "assistant") if self.chat else (None, None)
            return (Segment(prompt, trained=False, role=roles[0]), Segment(answer, role=roles[1]))
        strings = [v for v in value.values() if isinstance(v, str)]
        if not strings:
            found = ", ".join(f"{k!r}: {_kind(v)}" for k, v in list(value.items())[:8]) or "no field at all"
            names = ", ".join(f"`{n}`" for n in self.fields)
            raise DataError(
                f"{_place(record)}: no field holds text (found {found}); allowed are {names}, "
                f"`{self.prompt}` with `{self.answer}`, or any other field with a string"
            )
        return (Segment("\n".join(s for s in strings if _filled(s))),)


def _place(record: Record) -> str:
    return f"{record.place}:{record.byte}" if record.line is not None else f"{record.place} (byte {record.byte})"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list | tuple):
        return "an array"
    return "an object" if isinstance(value, Mapping) else "no JSON value"
