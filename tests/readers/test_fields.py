"""The extractor's rules, over arbitrary JSON, against a second spelling of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_readers.fields import Fields

from nanovllm_core.contracts import Document, Record, Segment
from nanovllm_core.errors import DataError

TEXT = st.text(max_size=8) | st.sampled_from(["", " ", "\n\t"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["text", "content", "body", "input", "output", "title", "id", "notes"])
RECORDS = VALUE | st.dictionaries(KEYS, VALUE, max_size=8) | st.dictionaries(KEYS, TEXT, max_size=8)


def extract(value: object, extractor: Fields | None = None) -> Document:
    document = (extractor or Fields()).extract(Record(value=value, source="d/a.jsonl", line=3, index=2, byte=40))
    assert document is not None
    return document


def filled(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


@settings(max_examples=500, deadline=None)
@given(RECORDS)
def test_rules_over_arbitrary_json(value: object) -> None:
    if isinstance(value, str):
        expected = [Segment(value)]
    elif isinstance(value, dict):
        named = [value[k] for k in ("text", "content", "body") if filled(value.get(k))]
        strings = [v for v in value.values() if isinstance(v, str)]
        if named:
            expected = [Segment(named[0])]
        elif filled(value.get("input")) and "output" in value:
            answer = "" if value["output"] is None else value["output"]
            expected = [
                Segment(value["input"], trained=False, role="user"),
                Segment(answer, trained=True, role="assistant"),
            ][: 2 * isinstance(answer, str)]
        elif strings:
            expected = [Segment("\n".join(filter(filled, strings)))]
        else:
            expected = []
    else:
        expected = []
    if expected:
        assert extract(value) == Document(segments=tuple(expected), source="d/a.jsonl", index=2)
    else:
        with pytest.raises(DataError, match=r"^d/a\.jsonl:3:40: .*(allowed|expected a string)"):
            extract(value)


def test_examples_of_the_guide() -> None:
    assert extract({"text": "First"}).text == "First"
    assert extract({"content": "Alternative", "title": "no"}).text == "Alternative"
    assert extract({"text": " ", "body": "b"}).text == "b"
    assert extract({"title": "T", "n": 3, "notes": "N"}).text == "T\nN"
    assert extract({"input": "Q", "output": "A"}).text == "Q\nA"
    assert extract({"input": "", "output": "A"}).segments == (Segment("A"),)


def test_options() -> None:
    pair = {"question": "Q", "reply": "A", "text": "t"}
    named = Fields(fields=("markdown",), prompt="question", answer="reply", chat=False)
    assert extract(pair, named).segments == (Segment("Q", trained=False), Segment("A"))
    assert extract({"markdown": "m", **pair}, named).text == "m"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (3, "a number"),
        (True, "true or false"),
        (["x"], "an array"),
        ({}, "no field at all"),
        ({"id": 3, "tags": ["x"]}, "'id': a number, 'tags': an array"),
    ],
)
def test_what_holds_no_string_is_named(value: object, found: str) -> None:
    with pytest.raises(DataError, match=f"{found}.*allowed"):
        extract(value)
    with pytest.raises(DataError, match=r"a\.json\[7\] \(byte 90\)"):
        Fields().extract(Record(value=value, source="a.json", index=7, byte=90))


@pytest.mark.parametrize("answer", [None, ""])
def test_a_prompt_without_an_answer_is_never_trained(answer: str | None) -> None:
    document = extract({"input": "What is it?", "output": answer})
    assert [(s.text, s.trained) for s in document.segments] == [("What is it?", False), ("", True)]


@pytest.mark.parametrize("answer", [7, ["a"], {"a": "b"}, True])
def test_an_answer_that_is_no_string_is_an_error(answer: object) -> None:
    with pytest.raises(DataError, match=r"`output` is .*, expected a string"):
        extract({"input": "What is it?", "output": answer})
