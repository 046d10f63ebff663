"""Strict structuring: exact types, every problem with its place, validators' own words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pytest
from attrs import field, frozen

from nanovllm_core.contracts import ModelRef
from nanovllm_core.errors import BrokenComponent, OptionError, RecipeError
from nanovllm_core.options import INTERNAL, Bounds, one_of
from nanovllm_core.structure import above, at_least, at_most, below, between, describe, path_text, structure
from nanovllm_core.yamltext import parse

if TYPE_CHECKING:
    from decimal import Decimal


@frozen(kw_only=True)
class Inner:
    """Something inside.

    level: how hard to press,
      in bars
    name: what to call it
    """

    level: int = field(default=3, validator=at_most(5))
    name: str


@frozen(kw_only=True)
class Outer:
    """All kinds of option."""

    flag: bool = False
    count: int = field(default=1, validator=at_least(1))
    rate: float = field(default=0.5, validator=[above(0), below(1)])
    either: int | float = 3
    maybe: int | None = None
    mode: Literal["fast", "slow", 3] = "fast"
    words: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "a")
    numbers: list[float] = field(factory=list)
    table: dict[str, int] = field(factory=dict)
    raw: Mapping[str, Any] = field(factory=dict)
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    model: ModelRef = "hub/name"
    folder: Path = Path("x")
    word_or_table: str | dict[str, int] = ""
    kept: int = field(default=9, metadata=INTERNAL)


@frozen
class Unresolved:
    amount: Decimal


@frozen(kw_only=True)
class Range:
    low: int = field()
    high: int = field(default=10)

    @low.validator
    def _ordered(self, attribute: attrs.Attribute, value: int) -> None:
        if value > self.high:
            raise ValueError(f"got {value}, above high ({self.high})")


@frozen(kw_only=True)
class Whole:
    parts: int = 1
    odd: int = field(default=1, validator=attrs.validators.in_([1, 3]))
    seen: float = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        if self.parts == 13:
            raise ValueError("13 parts make no whole")


def test_values_of_every_kind() -> None:
    given: dict[str, Any] = {
        "flag": True, "count": 2, "rate": 0.25, "either": 3, "maybe": 4, "mode": 3, "words": ["a"], "pair": [2, "b"],
        "numbers": [1, 2.5], "table": {"a": 1}, "raw": {"x": [1, None]}, "inner": {"name": "n"},
        "inners": [{"name": "m", "level": 5}], "word_or_table": {"k": 2},
    }  # fmt: skip
    made = structure(given, Outer)
    assert made == Outer(
        **{**given, "words": ("a",), "pair": (2, "b"), "inner": Inner(name="n"), "inners": (Inner(name="m", level=5),)}
    )
    assert type(made.numbers[0]) is float
    assert type(made.either) is int
    assert type(structure({"either": 3.0}, Outer).either) is float
    assert structure({}, Outer) == Outer()
    assert structure(made, Outer) is made


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("flag", "no", "got 'no', expected true or false"),
        ("flag", 1, "got 1, expected true or false"),
        ("count", 3.0, "got 3.0, expected integer"),
        ("count", True, "got true, expected integer"),
        ("count", "3", "got '3', expected integer"),
        ("count", None, "got null, expected integer"),
        ("count", 0, "got 0, at least 1"),
        ("rate", 1, "got 1.0, below 1"),
        ("rate", 0, "got 0.0, above 0"),
        ("rate", 10**400, "too large"),
        ("either", "x", "got 'x', expected number"),
        ("maybe", "x", "got 'x', expected integer or null"),
        ("mode", "fats", "got 'fats'; did you mean 'fast'? (allowed: 'fast', 'slow', 3)"),
        ("mode", True, "got true (allowed"),
        ("words", "abc", "got 'abc', expected list of string"),
        ("words", [1], "words[0]: got 1, expected string"),
        ("pair", [1], "got 1 items, expected 2"),
        ("table", {"a": "b"}, "table.a: got 'b', expected integer"),
        ("inner", [], "got a list, expected mapping or null"),
        ("inner", {}, "inner: 'name' is missing (string)"),
        ("inner", {"name": "n", "level": 7}, "inner.level: got 7, at most 5"),
        ("word_or_table", 3, "got 3, expected string or mapping of integer"),
        ("word_or_table", {"a": "x"}, "word_or_table.a: got 'x', expected integer"),
        ("folder", 3, "got 3, expected string"),
        ("kept", 3, "unknown key 'kept'"),
        ("flags", 3, "unknown key 'flags'; did you mean 'flag'?"),
    ],
)
def test_refusals(key: str, value: object, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        structure({key: value}, Outer)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_problem_at_once_each_with_its_place() -> None:
    text = parse("a:\n- count: 0\n  inners: [{name: x, level: 7}, {lvel: 1}]\n  maybe: {}\n  kount: 2\n", "r.yaml")
    with pytest.raises(OptionError) as caught:
        structure(text.data["a"][0], Outer, path=("a", 0), places=text, error=OptionError)
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            "r.yaml:2:10: a[0].count: got 0, at least 1",
            "r.yaml:3:29: a[0].inners[0].level: got 7, at most 5",
            "r.yaml:3:34: a[0].inners[1]: unknown key 'lvel'; did you mean 'level'? (allowed: level, name)",
            "r.yaml:3:33: a[0].inners[1]: 'name' is missing (string)",
            "r.yaml:4:10: a[0].maybe: got a mapping, expected integer or null",
            "r.yaml:5:3: a[0]: unknown key 'kount'; did you mean 'count'? (allowed: "
            + ", ".join(a.name for a in attrs.fields(Outer) if a.name != "kept")
            + ")",
        ]
    )


def test_validators_that_look_at_other_options_and_whole_classes() -> None:
    with pytest.raises(RecipeError, match=r"^low: got 11, above high \(10\)$"):
        structure({"low": 11}, Range)
    with pytest.raises(RecipeError, match=r"^high: got 'x', expected integer$"):
        structure({"low": 11, "high": "x"}, Range)
    with pytest.raises(RecipeError, match=r"^13 parts make no whole$"):
        structure({"parts": 13}, Whole)
    with pytest.raises(RecipeError, match=r"^odd: 'odd' must be in \[1, 3\]"):
        structure({"odd": 2}, Whole)
    with pytest.raises(RecipeError, match="unknown key 'seen'"):
        structure({"seen": 2}, Whole)


def test_folders_count_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    here = structure({"model": "models/mine", "folder": "out"}, Outer, base=tmp_path)
    assert here.model == str((tmp_path / "models" / "mine").resolve())
    assert here.folder == tmp_path / "out"
    assert structure({"model": "Qwen/Qwen3-0.6B"}, Outer, base=tmp_path).model == "Qwen/Qwen3-0.6B"
    assert structure({"model": ""}, Outer, base=tmp_path).model == ""


def test_types_that_cannot_be_resolved_are_the_plugins_fault() -> None:
    with pytest.raises(BrokenComponent, match=r"Decimal.*TYPE_CHECKING"):
        structure({"amount": 1}, Unresolved)


def test_bounds() -> None:
    attribute = attrs.fields(Inner).level
    for bounds, good, bad, text in [
        (at_least(2), (2, 3), (1, 1.9), "at least 2"),
        (at_most(2), (2, -5), (3,), "at most 2"),
        (between(0, 1), (0, 1, 0.5), (-1, 2, float("nan")), "between 0 and 1"),
        (above(0), (1e-9,), (0, -1, float("nan")), "above 0"),
        (below(1), (0.999,), (1,), "below 1"),
        (Bounds(low=0, high=1, open_low=True), (1, 0.5), (0, 1.1), "above 0 and at most 1"),
    ]:
        for value in (*good, None):
            bounds(None, attribute, value)
        for value in bad:
            with pytest.raises(ValueError) as caught:
                bounds(None, attribute, value)
            assert str(caught.value) == f"got {value}, {text}"
        with pytest.raises(TypeError, match="got 'x', expected a number"):
            bounds(None, attribute, "x")


def test_one_of() -> None:
    attribute = attrs.fields(Inner).name
    allowed = one_of("tiny", "small", 3)
    for value in ("tiny", 3, None):
        allowed(None, attribute, value)
    for value, said in [("smal", "got 'smal'; did you mean 'small'?"), (3.0, "got 3.0"), (True, "got true")]:
        with pytest.raises(ValueError) as caught:
            allowed(None, attribute, value)
        assert str(caught.value) == f"{said} (allowed: 'tiny', 'small', 3)"


def test_paths_and_descriptions() -> None:
    assert path_text(("data", "readers", 0, "level")) == "data.readers[0].level"
    assert path_text(("kernels", "*")) == "kernels.*"
    assert path_text(()) == ""
    assert [tuple(o) for o in describe(Inner)] == [
        ("level", "integer", "3", "how hard to press, in bars"),
        ("name", "string", "required", "what to call it"),
    ]
    rows = {o.name: o for o in describe(Outer)}
    assert rows["mode"].type == "'fast' | 'slow' | 3"
    assert tuple(rows["numbers"]) == ("numbers", "list of number", "[]", "")
    assert rows["model"].type == "model folder or hub name"
    assert "kept" not in rows


def test_cattrs_is_loaded_only_when_something_is_structured() -> None:
    code = "import sys, nanovllm_core.recipe; assert not {'cattrs', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
