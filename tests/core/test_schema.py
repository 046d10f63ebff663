"""`nanovllm schema`: what an editor is told of a recipe agrees with what the core takes."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import field, frozen
from attrs.validators import and_, ge, lt, optional
from jsonschema import Draft202012Validator

from nanovllm_core import Recipe, Registry, hookimpl
from nanovllm_core.contracts import ModelRef
from nanovllm_core.demo import RECIPE
from nanovllm_core.options import Bounds, above, at_least, at_most, between, one_of
from nanovllm_core.schema import schema
from nanovllm_core.structure import describe
from nanovllm_core.yamltext import parse

ROOT = Path(__file__).parent.parent.parent


@frozen(kw_only=True)
class Inner:
    level: int = field(default=3, validator=at_most(5))
    name: str


@frozen(kw_only=True, eq=False)
class Every:
    """Every kind of option.

    count: how many,
      at the least one
    """

    count: int = field(default=1, validator=at_least(1))
    share: float = field(default=0.5, validator=Bounds(low=0, high=1, open_low=True))
    some: int | None = field(default=None, validator=between(2, 4))
    theirs: int | None = field(default=None, validator=optional(and_(ge(1), lt(9))))
    size: str = field(default="a", validator=one_of("a", "b"))
    maybe: str | None = field(default=None, validator=one_of("x"))
    mode: Literal["fast", 3] = "fast"
    either: int | float = field(default=1, validator=above(0))
    flag: bool = False
    words: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "a")
    table: Mapping[str, int] = field(factory=dict)
    raw: Any = None
    inner: Inner | None = None
    folder: Path = Path("x")
    model: ModelRef = ModelRef("hub/name")
    made: int = field(factory=lambda: 7)
    computed: int = attrs.Factory(lambda self: self.count, takes_self=True)

    @hookimpl
    def note(self, text): ...


@frozen(kw_only=True, eq=False)
class Needs:
    """Cannot stand alone."""

    path: str

    @hookimpl
    def note(self, text): ...


@pytest.fixture(scope="module")
def installed():
    made, broken = schema(Registry.from_environment())
    assert broken == []
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


@pytest.fixture(scope="module")
def strange():
    registry = Registry.from_environment().extended(
        callbacks={"every": Every, "needs": Needs, "ready": Needs(path="x")}
    )
    made, _ = schema(registry)
    Draft202012Validator.check_schema(made)
    return made


def test_good_recipes_are_valid(installed):
    installed.validate(parse(RECIPE, "demo").data)
    files = list(ROOT.glob("recipes/*.yaml"))
    assert files
    for file in files:
        installed.validate(parse(file.read_text(), str(file)).data)
        installed.validate(Recipe.load(file).to_data())
    installed.validate(Recipe().to_data())
    installed.validate(Recipe.from_text(RECIPE).to_data())
    for text in (
        "model: nanovllm/preset",
        "model: {use: nanovllm/preset, size: small}",
        "data: {readers: [json, {use: txt, encoding: latin-1}], extractors: {use: auto, fields: [a]}}",
        "kernels: torch",
        "kernels: {attention: torch, '*': {use: auto}}",
        "tokenizer: {use: auto, size: 300}",
        "generate: {prompts: Once, stop: [a, b]}",
        "train: {num_train_epochs: 0.5, max_steps: null}",
    ):
        installed.validate(parse(text, "f").data)


def test_every_key_and_option_is_told_with_its_meaning(installed):
    told = installed.schema["properties"]
    for option in describe(Recipe):
        assert told[option.name]["description"] == option.doc
    assert told["train"]["properties"]["learning_rate"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "the highest, reached after warm-up",
        "default": 5e-5,
    }
    names = installed.schema["$defs"]["models"]["anyOf"][0]["anyOf"]
    summary = "A new transformer of a preset size, from random weights."
    assert {"const": "preset", "description": summary} in names
    assert "pretrained" not in {name["const"] for name in names}  # its path is required


def every(**options):
    return {"callbacks": [{"use": "every", **options}]}


def test_options_of_every_kind(strange):
    validator = Draft202012Validator(strange)
    [rule] = [
        r for r in strange["$defs"]["callbacks"]["anyOf"][1]["allOf"] if "every" in r["if"]["properties"]["use"]["enum"]
    ]
    options = rule["then"]["properties"]
    assert options["count"]["description"] == "how many, at the least one"
    assert [options[n].get("default", "none") for n in ("made", "computed", "folder", "pair", "inner")] == [
        7, "none", "x", [1, "a"], None
    ]  # fmt: skip
    good = {
        "count": 1, "share": 1, "some": None, "theirs": 8, "size": "b", "maybe": None, "mode": 3, "either": 0.5,
        "flag": True, "words": ["a"], "pair": [2, "b"], "table": {"a": 1}, "raw": [{}], "inner": {"name": "n"},
        "folder": "y", "model": "z",
    }  # fmt: skip
    validator.validate(every(**good))
    bad = [
        ("count", 0), ("count", 1.5), ("count", True), ("share", 0), ("share", 1.1), ("some", 5), ("theirs", 9),
        ("theirs", 0), ("size", "c"), ("size", None), ("maybe", "y"), ("mode", "slow"), ("either", 0), ("either", None),
        ("flag", "on"), ("words", "a"), ("words", [1]), ("pair", [1]), ("pair", [1, "a", 2]), ("table", {"a": "b"}),
        ("inner", {}), ("inner", {"name": "n", "level": 6}), ("inner", {"name": "n", "x": 1}), ("folder", 1), ("cuont", 1),
    ]  # fmt: skip
    for name, value in bad:
        assert not validator.is_valid(every(**{name: value})), (name, value)


def test_names_alone_with_options_and_twice(strange):
    validator = Draft202012Validator(strange)
    for good in ("every", ["ready", {"use": "needs", "path": "x"}], {"use": "ready"}, [], ["(given)/every"]):
        validator.validate({"callbacks": good})
    for bad in ("needs", "evry", {"use": "needs"}, {"use": "ready", "path": "x"}, "auto", {}, None, [["every"]]):
        assert not validator.is_valid({"callbacks": bad}), bad


def test_the_command_prints_it_without_heavy_imports():
    code = (
        "import sys; from nanovllm_core.cli import main; main(['schema'])\n"
        "assert not {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == schema(Registry.from_environment())[0]
