"""A small world for the data path: documents in memory, and a tokenizer whose ids are easy to foresee."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nanovllm_core.contracts import Document, Record, Segment, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources


class Letters:
    """One id a character (its code point, offset by 4); <b> opens, <e> closes. A real tokenizer, only a plain one."""

    special_texts = ("<b>", "<e>", "<u>")

    def __init__(self, *, prefix: bool = True, template: bool = False, vocab_size: int = 1 << 16) -> None:
        self.vocab_size = vocab_size
        self.prefix_ids = (0,) if prefix else ()
        self.end_id, self.stop_ids = 1, (1,)
        self.has_chat_template = template
        self.fingerprint = hashlib.sha256(repr((prefix, template, vocab_size)).encode()).hexdigest()
        self.calls: list[int] = []  # characters of each encode call

    def encode(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        self.calls.append(sum(map(len, texts)))
        return [self._ids(t, markup) for t in texts]

    def _ids(self, text: str, markup: bool) -> list[int]:
        ids, i = [], 0
        while i < len(text):
            if markup and text[i : i + 3] in self.special_texts:
                ids.append(self.special_texts.index(text[i : i + 3]))
                i += 3
            else:
                ids.append(4 + ord(text[i]))
                i += 1
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - 4) for i in ids if i >= 4)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        text = "".join(f"<u>{m['role'][0]}:{m['content'].strip()}<e>\n" for m in messages)
        return text + "<u>a:" * answer_next

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class Memory:
    """A reader over records in memory: {source name: values}."""

    def __init__(self, values: Mapping[str, Sequence[object]]) -> None:
        self.values = values

    def read(self, source: Source) -> Iterator[Record]:
        for index, value in enumerate(self.values[source.name]):
            yield Record(value=value, source=source.name, index=index, byte=index)


def document_of(record: Record) -> Document | None:
    """Strings are text, pairs are prompt and answer, None is nobody's."""
    if record.value is None:
        return None
    if isinstance(record.value, str):
        segments: tuple[Segment, ...] = (Segment(record.value),)
    else:
        prompt, answer = record.value
        segments = (Segment(prompt, trained=False, role="user"), Segment(answer, role="assistant"))
    return Document(segments=segments, source=record.source, index=record.index)


@pytest.fixture(scope="session")
def memory() -> Callable[[Mapping[str, Sequence[object]]], Documents]:
    """Documents over {source name: values}; names ending in .bin are nobody's."""

    def make(values: Mapping[str, Sequence[object]]) -> Documents:
        found = tuple(Source(path=n, name=n, size=100) for n in values)
        reader = Memory(values)
        return Documents(
            Sources(path="mem", sources=found), lambda s: None if s.name.endswith(".bin") else reader, document_of
        )

    return make


@pytest.fixture(scope="session")
def letters() -> type[Letters]:
    return Letters
