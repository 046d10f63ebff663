"""What `auto` means, with and without options, in each place where a recipe may write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan
from nanovllm_core.contracts import Document, Record, Segment
from nanovllm_core.errors import BrokenComponent, OptionError, RefusedError, UnknownComponent
from nanovllm_core.explain import explain
from nanovllm_core.plan import Plan


@frozen(kw_only=True, eq=False)
class Shouts:
    """Text in capitals."""

    fields: tuple[str, ...] = ("shout",)

    @hookimpl
    def extract(self, record: Record) -> Document | None:
        text = record.value.get(self.fields[0])
        return None if text is None else Document(segments=(Segment(text.upper()),), source=record.source)


@frozen(kw_only=True, eq=False)
class Needs(Shouts):
    """Cannot be made without an option."""

    level: int


@frozen(kw_only=True, eq=False)
class Mute:
    """Answers nothing."""

    @hookimpl
    def vocab_size(self, data_bytes: int) -> Any: ...

    @hookimpl
    def make(self, texts: Any, vocab_size: int) -> Any: ...


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    def make(**keys: Any) -> Plan:
        records = [{"text": "plain"}, {"shout": "loud", "text": "plain"}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        data = {"path": str(tmp_path / "a.jsonl"), **keys.pop("data", {})}
        recipe = {"data": data, "model": "preset", "output_dir": str(tmp_path / "out"), **keys}
        registry = Registry.from_environment().extended(
            extractors={"shouts": Shouts, "allneeds": Needs}, tokenizers={"mute": Mute}
        )
        return make_plan(Recipe.from_data(recipe), registry, Machine())

    return make


def test_extractors_named_first_then_all_others_by_name_and_why_one_is_not_asked(plan: Any) -> None:
    made = plan(data={"extractors": "auto"})
    assert [c.entry.name for c in made.data.extractors] == ["allneeds", "fields", "shouts"]
    assert [d.text for d in made.data.documents] == ["plain", "plain"]
    assert "allneeds from (given): unusable: " in explain(made)
    assert "'level' is missing" in explain(made)
    made = plan(data={"extractors": ["shouts", "auto"]})
    assert [c.entry.name for c in made.data.extractors] == ["shouts", "allneeds", "fields"]
    assert [d.text for d in made.data.documents] == ["plain", "LOUD"]


def test_options_of_auto_go_to_every_extractor(plan: Any) -> None:
    made = plan(data={"extractors": {"use": "auto", "fields": ["shout"]}})
    assert [c.component.fields for c in made.data.extractors if not c.unusable] == [("shout",), ("shout",)]
    with pytest.raises(RefusedError, match=r"(?s)^data\.extractors: no component can be used:.*fields: .*'feilds'"):
        plan(data={"extractors": {"use": "auto", "feilds": ["shout"]}})


def test_the_models_own_tokenizer_with_options(plan: Any) -> None:
    made = plan(tokenizer={"use": "auto", "size": 300}).model
    assert (made.tokenizer.entry.name, made.tokenizer.by, made.vocabulary.value) == ("bpe", "default", 300)
    assert plan(tokenizer="auto").model.tokenizer.entry.name == "bpe"
    with pytest.raises(OptionError, match="tokenizer: unknown key 'sise'; did you mean 'size'"):
        plan(tokenizer={"use": "auto", "sise": 300})


def test_a_hook_without_an_answer_is_named(plan: Any) -> None:
    with pytest.raises(BrokenComponent, match=r"^tokenizers:mute: 'vocab_size' answered None, not a Decision$"):
        plan(tokenizer="mute")


def test_callbacks_are_not_chosen(plan: Any) -> None:
    with pytest.raises(UnknownComponent, match=r"callbacks\[1\]: `auto` chooses nothing here; .*metrics, progress"):
        plan(callbacks=["metrics", "auto"])


def test_options_that_no_reader_takes_are_told_of_each(plan: Any) -> None:
    with pytest.raises(RefusedError, match=r"data\.readers: no component can be used:(?s:.*)jsonl: .*'typo'"):
        plan(data={"readers": {"use": "auto", "typo": 1}})
