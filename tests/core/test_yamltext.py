"""YAML text: the 1.2 core schema, what is refused and where, and that what is dumped reads back."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm_core.errors import RecipeError
from nanovllm_core.yamltext import MAX_DEPTH, Place, dump, parse, read, resolve

TRICKY = r"""
5e-5 on no null ~ true 012 0x1f .5 .inf 1_000 ? << ... --- é * *a & % @ ` !x = [ } , : ' " \ 😀 -
""".split()  # noqa: SIM905
TRICKY += ["", "- a", "a: b", "# x", "a #b", "a\nb\n", "\n", "\t", " lead", "trail ", "\r\n", "\x00", "\x7f", "\x85"]
TRICKY += ["\u2028", "\ufeff", "\ud7ff", "\ue000", "\ufffe"]
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
scalars |= st.sampled_from(TRICKY)
nests = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


def same(a: object, b: object) -> bool:
    """Equal, in type and sign of zero too."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(nests)
@example({"k" * 2000: [{"k" * 1001: {"a": 1}}], "\x00" * 300: [[], {}]})
@example([[[1, [2]], {"a": [{"b": {}}]}], "a\r\nb"])
def test_what_is_dumped_reads_back(data: object) -> None:
    assert same(parse(dump(data), "f").data, data)


@given(st.text(max_size=200))
def test_any_text_is_data_or_a_recipe_error(text: str) -> None:
    said = "f:"
    try:
        dump(parse(text, "f").data)
    except RecipeError as e:
        said = str(e)
    assert said.startswith("f:")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(t, None) for t in ("", "~", "null", "Null", "NULL")],
        *[(t, True) for t in ("true", "True", "TRUE")],
        *[
            (t, t)
            for t in ("on", "off", "yes", "no", "Yes", "y", "nULL", "tRue", "1_000", "12:30", "0b1", "1e", "=", "0x")
        ],
        *[("012", 12), ("+3", 3), ("-0", 0), ("0o17", 15), ("0x1F", 31), ("-7", -7)],
        *[("5e-5", 5e-5), ("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("-1.5E+3", -1500.0), ("1E3", 1000.0)],
    ],
)
def test_core_schema(text: str, value: object) -> None:
    assert same(resolve(text), value)
    if text:
        assert same(parse(f"a: {text}", "f").data, {"a": value})
        assert parse(f"a: '{text}'\nb: \"{text}\"", "f").data == {"a": text, "b": text}


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a: 1\nb: 2\na: 3", "f:3:1", "appears twice (first at line 1)"),
        ("a: &x 1", "f:1:4", "anchor"),
        ("a: [*x]", "f:1:5", "alias"),
        ("*: x", "f:1:2", "put quotes around a string that begins with '*'"),
        ("a: !!python/name:os.system x", "f:1:4", "tag"),
        ("!t\na: 1", "f:1:1", "tag"),
        ("a: ! x", "f:1:4", "tag"),
        ("&x a: 1", "f:1:1", "no anchor"),
        ("*x : 1", "f:1:1", "alias"),
        ("a:\n  <<: {b: 1}", "f:2:3", "merge key"),
        ("a: 1\n---\nb: 2", "f:2:1", "second document"),
        ("1: x", "f:1:1", "key 1 must be a string"),
        ("a: {~: x}", "f:1:5", "must be a string"),
        ("? [a]\n: b", "f:1:3", "not a list or mapping"),
        ("a:\n\tb: 1", "f:2:1", "a tab"),
        ("a: b: c", "f:1:5", "needs quotes"),
        ("a: [1, 2", "f:1:9", "not valid YAML"),
        ("a: .nan", "f:1:4", "finite"),
        ("a: -.INF", "f:1:4", "finite"),
        ("a: 1e999", "f:1:4", "too large"),
        ("a: " + "9" * 5000, "f:1:4", "4,000 digits"),
        ("a: 0x" + "9" * 5000, "f:1:4", "4,000 digits"),
        ("a:\n  - ok\n  - b\x07", "f:3:6", "U+0007"),
        ('a: "\\ud800"', "f:1:4", "surrogate"),
        ("a: \ud800", "f:1:4", "U+D800"),
    ],
)
def test_refusals_carry_their_place(text: str, place: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(f"{place}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_depth_is_bounded_while_reading(opening: str) -> None:
    with pytest.raises(RecipeError, match=f"nested deeper than {MAX_DEPTH}|not a list or mapping"):
        parse(opening * 20_000, "f")
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f").data is not None
    data: list[object] = []
    for _ in range(MAX_DEPTH):
        data = [data]
    with pytest.raises(ValueError, match="nested deeper"):
        dump([data])


def test_places() -> None:
    text = parse("data:\n  readers:\n    - {use: jsonl, level: 7}\n    - txt\nmodel:\n", "r.yaml")
    assert str(text.place(("data", "readers", 0, "level"))) == "r.yaml:3:27"
    assert str(text.place(("data", "readers", 1))) == "r.yaml:4:7"
    assert str(text.place(("data", "readers", 0, "gone", 3))) == "r.yaml:3:7"
    assert str(text.key_place(("data", "readers", 0, "level"))) == "r.yaml:3:20"
    assert str(text.place(("nowhere",))) == "r.yaml:1:1"
    assert text.place(("model",)).line == 5
    assert str(Place("--set a=1")) == "--set a=1"


def test_files(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: caf\xc3\xa9\r\nb: 1\r\n")
    assert read(path).data == {"a": "café", "b": 1}
    assert read(path).place(("a",)).column == 4
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:4: byte 8 is not UTF-8"):
        read(path)
    path.write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        read(path)
    with pytest.raises(RecipeError, match="no such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("data", [float("nan"), float("inf"), {1: 2}, object(), "\ud800", b"x"])
def test_dump_refuses_what_yaml_cannot_hold(data: object) -> None:
    with pytest.raises(ValueError):
        dump(data)
