"""The recipe: defaults, components in each spelling, --set, and that YAML of a recipe is the recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_core.contracts import OPERATIONS
from nanovllm_core.errors import GenerationError, RecipeError
from nanovllm_core.options import INTERNAL
from nanovllm_core.recipe import AUTO, Component, Data, Generate, Recipe, Train
from nanovllm_core.structure import describe

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
components = st.builds(
    Component,
    use=st.text(min_size=1) | st.sampled_from(["auto", "jsonl", "my-dist/name", "null", "1"]),
    options=st.dictionaries(st.text().filter(lambda key: key != "use"), plain, max_size=3),
)
many = st.lists(components, max_size=3).map(tuple)
counts = st.integers(1, 10**9)
sequences = st.integers(1, 10**6)
seeds = st.integers(0, 2**63 - 1)
share = st.floats(0, 1, exclude_max=True)


@st.composite
def data_sections(draw) -> Data:
    length = draw(st.integers(2, 100_000))
    return Data(
        path=draw(st.none() | st.text()),
        readers=draw(many),
        extractors=draw(many),
        max_seq_length=length,
        concatenate_documents=draw(st.booleans()),
        document_separator=draw(st.text()),
        chunk_overlap=draw(st.none() | st.integers(0, length - 1)),
        min_chunk_size=draw(counts),
        eval_fraction=draw(share),
    )


recipes = st.builds(
    Recipe,
    data=data_sections(),
    tokenizer=st.none() | components,
    model=st.none() | components,
    kernels=st.dictionaries(st.sampled_from([*OPERATIONS, "*"]), components),
    parallel=components,
    train=st.builds(
        Train,
        learning_rate=st.floats(0, 1e9, exclude_min=True),
        weight_decay=st.floats(0, 1e9),
        beta1=share,
        beta2=share,
        per_device_train_batch_size=sequences,
        global_batch_size=st.none() | sequences,
        num_train_epochs=counts | st.floats(0, 1e3, exclude_min=True),
        max_steps=st.none() | counts,
        warmup_steps=st.none() | st.integers(0, 10**6),
        lr_scheduler_type=st.sampled_from(["cosine", "linear", "constant"]),
        mixed_precision=st.sampled_from(["auto", "bf16", "fp32"]),
        seed=seeds,
    ),
    generate=st.builds(
        Generate,
        prompts=st.lists(st.text(), max_size=3).map(tuple),
        temperature=st.floats(0, 1e3),
        top_k=st.none() | counts,
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0, 1e3, exclude_min=True),
        steps=st.integers(0, 10**6),
        seed=seeds,
        stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    ),
    callbacks=many,
    output_dir=st.text(),
)


@given(recipes)
def test_recipe_to_yaml_to_recipe_is_the_identity(recipe: Recipe) -> None:
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert json.dumps(again.to_data()) == json.dumps(recipe.to_data())  # == knows no difference between 1, 1.0 and true
    assert Recipe.from_data(recipe.to_data()) == recipe


def test_an_empty_recipe_is_the_guides_defaults() -> None:
    recipe = Recipe.from_text("")
    assert recipe == Recipe() == Recipe.from_text("# nothing yet\n")
    train = recipe.train
    assert (train.learning_rate, train.weight_decay, train.beta1, train.beta2) == (5e-5, 0.01, 0.9, 0.95)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.num_train_epochs) == (2, 4, 3)
    assert (train.eval_steps, train.save_steps, train.logging_steps, train.seed) == (500, 1000, 10, 42)
    assert (recipe.data.max_seq_length, recipe.data.min_chunk_size, recipe.output_dir) == (2048, 100, "./checkpoints")
    assert recipe.kernels == {"*": AUTO}
    assert [c.use for c in recipe.callbacks] == ["progress", "metrics"]


def test_every_key_is_explained() -> None:
    for cls in (Recipe, Data, Train, Generate):
        rows = {option.name: option for option in describe(cls)}
        assert list(rows) == [a.name for a in attrs.fields(cls) if a.metadata != INTERNAL]
        assert [name for name, option in rows.items() if not option.doc] == []


def test_components_in_each_spelling() -> None:
    text = """
data: {readers: jsonl, extractors: [fields, {use: mine, depth: 2}]}
model: {use: preset, size: tiny, rope: {theta: 1e4}}
kernels: {attention: dist/flash, "*": {use: torch, chunk: 8}}
parallel: auto
"""
    recipe = Recipe.from_text(text)
    assert recipe.data.readers == (Component(use="jsonl"),)
    assert recipe.data.extractors == (Component(use="fields"), Component(use="mine", options={"depth": 2}))
    assert recipe.data.extractors[1].at == ("data", "extractors", 1)
    assert recipe.data.readers[0].at == ("data", "readers")
    assert recipe.model == Component(use="preset", options={"size": "tiny", "rope": {"theta": 1e4}})
    assert recipe.kernels["attention"] == Component(use="dist/flash")
    assert recipe.kernels["*"].options == {"chunk": 8}
    assert Recipe.from_text("kernels: {use: torch, chunk: 8}").kernels == {
        "*": Component(use="torch", options={"chunk": 8})
    }
    assert Recipe.from_text("kernels: {attention: flash}").kernels["*"] == AUTO
    assert Recipe.from_text("generate: {prompts: Once, stop: [a]}").generate.prompts == ("Once",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "f:1:1: got a list; a recipe is a mapping"),
        ("modle: preset", "f:1:1: unknown key 'modle'; did you mean 'model'?"),
        ("text: x", "f:1:1: unknown key 'text'"),
        ("base: x", "f:1:1: unknown key 'base'"),
        ("model: {size: tiny}", "f:1:8: model: 'use' is missing"),
        ("model: {use: [a]}", "f:1:14: model.use: got a list"),
        ("data: {readers: [txt, 3]}", "f:1:23: data.readers[1]: got 3"),
        ("parallel: null", "f:1:11: parallel: got null"),
        ('model: ""', "f:1:8: model: got ''"),
        ("kernels: {attnetion: x}", "f:1:11: kernels: unknown operation 'attnetion'; did you mean 'attention'?"),
        ("train: {learning_rate: 0}", "f:1:24: train.learning_rate: got 0.0, above 0"),
        ("train: {seed: 1.0}", "f:1:15: train.seed: got 1.0, expected integer"),
        ("train: 3", "f:1:8: train: got 3, expected mapping"),
        ("train: {lr_scheduler_type: cosin}", "did you mean 'cosine'?"),
        ("data: {max_seq_length: 64, chunk_overlap: 64}", "data.chunk_overlap: got 64, below max_seq_length (64)"),
        ("data: {eval_fraction: 1}", "data.eval_fraction: got 1.0, below 1"),
        ("generate: {top_p: 0}", "generate.top_p: got 0.0, above 0 and at most 1"),
        ('generate: {stop: [a, ""]}', "f:1:18: generate.stop: got '', an empty text"),
        ('generate: {stop: ""}', "f:1:18: generate.stop: got '', an empty text"),
        ("generate: {prompts: [1]}", "generate.prompts[0]: got 1, expected string"),
        ("callbacks: {}", "callbacks: 'use' is missing"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(text, file="f")
    assert said in str(caught.value)


NO_SAMPLING = [
    *(("temperature", v) for v in (-1, -0.1, math.inf, math.nan, "1", True, None)),
    *(("top_k", v) for v in (0, -1, 1.0, True, "1")),
    *(("top_p", v) for v in (0, -0.1, 1.1, 2, math.nan, math.inf, "1", True, None)),
    *(("min_p", v) for v in (-0.1, 1.1, math.nan, math.inf, "1", True, None)),
    *(("repetition_penalty", v) for v in (0, -1, math.nan, math.inf, "1", True, None)),
    *(("max_tokens", v) for v in (0, -1, 1.0, True, "1", None)),
    *(("seed", v) for v in (-1, 2**63, 1.0, True, "1")),
    *(("stop", v) for v in ("", ["a", ""], [1], [None])),
]


@pytest.mark.parametrize(("name", "value"), NO_SAMPLING)
def test_what_sampling_refuses_the_recipe_refuses_before_training(name: str, value: Any) -> None:
    from nanovllm_core.inference.params import SamplingParams

    with pytest.raises(GenerationError, match=name):
        SamplingParams(**{name: value})
    with pytest.raises(RecipeError, match=f"generate.{name}"):
        Recipe.from_data({"generate": {name: value}})


def test_sampling_has_a_bad_value_for_each_of_its_constraints() -> None:
    from nanovllm_core.inference.params import SamplingParams

    names = {a.name for a in attrs.fields(SamplingParams)} & {a.name for a in attrs.fields(Generate)}
    assert names == {name for name, _ in NO_SAMPLING}


def test_problems_of_components_and_values_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text("model: 3\ntrain: {sed: 1}\nkernels: {x: y}\n", file="f")
    assert len(str(caught.value).splitlines()) == 3


def test_settings() -> None:
    text = "model: {use: preset, size: tiny}\ntrain: {seed: 1}\nkernels: torch\ncallbacks: mine\n"

    def settle(*sets: str) -> Recipe:
        return Recipe.from_text(text, sets=sets)

    assert settle("train.learning_rate=1e-4").train == Train(seed=1, learning_rate=1e-4)
    assert settle("model.size=small").model == Component(use="preset", options={"size": "small"})
    assert settle("model=llama").model == Component(use="llama")
    assert settle("model.use=llama").model == Component(use="llama")
    assert settle("model.use=llama", "model.size=1").model == Component(use="llama", options={"size": 1})
    assert settle("model={use: llama, size: 2}").model == Component(use="llama", options={"size": 2})
    assert settle("model.rope.theta=1e4").model.options == {"size": "tiny", "rope": {"theta": 1e4}}
    assert settle("kernels.attention=flash").kernels == {
        "*": Component(use="torch"),
        "attention": Component(use="flash"),
    }
    assert settle("kernels.*.chunk=8").kernels == {"*": Component(use="torch", options={"chunk": 8})}
    assert settle("kernels.use=other").kernels == {"*": Component(use="other")}
    assert settle("parallel=ddp").parallel == Component(use="ddp")
    assert settle("parallel.x=1").parallel == Component(use="auto", options={"x": 1})
    assert settle("data.readers.0.encoding=latin-1").data.readers == (
        Component(use="auto", options={"encoding": "latin-1"}),
    )
    assert [c.use for c in settle("callbacks.1=metrics").callbacks] == ["mine", "metrics"]
    assert settle("generate.prompts=[a, b]", "generate.prompts.2=c").generate.prompts == ("a", "b", "c")
    assert settle("generate.prompts=one").generate.prompts == ("one",)
    assert settle("tokenizer=null", 'data.document_separator="\\n"').data.document_separator == "\n"
    assert settle("output_dir=a=b").output_dir == "a=b"
    assert settle("train.max_steps=").train.max_steps is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train..seed=3", "expected KEY=VALUE"),
        ("trian.seed=3", "unknown key 'trian'; did you mean 'train'?"),
        ("train.lerning_rate=3", "train: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("text=3", "unknown key 'text'"),
        ("train.seed=x", "train.seed: got 'x', expected integer"),
        ("train.seed=[", "not valid YAML"),
        ("train.seed.x=1", "train.seed is a single value"),
        ("data.readers.2=x", "data.readers is a list of 1; give a number from 0 to 1"),
        ("data.readers.use=x", "give a number"),
        ("kernels.attnetion=x", "unknown operation 'attnetion'; did you mean 'attention'?"),
        ("model.size=3", "model: 'use' is missing"),
        ("model=3", "model: got 3"),
        ("data.max_seq_length=1", "data.max_seq_length: got 1, at least 2"),
    ],
)
def test_settings_that_cannot_be_name_themselves(setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text("output_dir: x\n", sets=[setting])
    assert str(caught.value).startswith(f"--set {setting}: ")
    assert said in str(caught.value)


def test_everything_within_a_set_value_has_the_settings_place() -> None:
    train, model = "train={learning_rate: 1e-4}", "model={use: preset, size: small}"
    recipe = Recipe.from_text("train: {seed: 1, learning_rate: 3}\nmodel: {use: x, depth: 1}\n", sets=[train, model])
    places = recipe.text.places
    assert str(places["train", "learning_rate"]) == f"--set {train}"
    assert str(places["model", "size"]) == f"--set {model}"
    assert ("train", "seed") not in places
    assert ("model", "depth") not in places
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text("", sets=["train={sed: 1, beta1: 2}"])
    assert [s.partition("}: ")[2] for s in str(caught.value).splitlines()] == [
        "train: unknown key 'sed'; did you mean 'seed'? (allowed: "
        + ", ".join(a.name for a in attrs.fields(Train))
        + ")",
        "train.beta1: got 2.0, below 1",
    ]


def test_loading(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {path: docs}\nmodel: preset\n", encoding="utf-8")
    recipe = Recipe.load(tmp_path / "r.yaml", sets=["train.seed=7"])
    assert recipe.base == tmp_path
    assert recipe.train.seed == 7
    assert str(recipe.text.place(("data", "path"))) == f"{tmp_path / 'r.yaml'}:1:14"
    assert str(recipe.text.place(("train", "seed"))) == "--set train.seed=7"


def test_from_data_leaves_what_it_is_given_alone() -> None:
    given = {"model": {"use": "preset", "sizes": [1]}}
    recipe = Recipe.from_data(given, sets=["model.sizes.0=2"])
    recipe.to_data()["model"]["sizes"].append(3)
    assert given == {"model": {"use": "preset", "sizes": [1]}}
    assert recipe.model.options == {"sizes": [2]}
