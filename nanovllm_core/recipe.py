"""The recipe: what a person writes down, as frozen classes.

It holds names and raw options and knows no plugin: the plan finds the components and checks their options. So a recipe
can be read, changed and written back where none of its components is installed, at the price that a wrong option of a
component is met one step later.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs
from attrs import field, frozen

from nanovllm_core.contracts import GENERATION, JOINED, OPERATIONS
from nanovllm_core.errors import RecipeError, nearest
from nanovllm_core.optimisation import Train as Train
from nanovllm_core.options import INTERNAL, Bounds, above, at_least, below, shown
from nanovllm_core.overrides import COMPONENT, COMPONENT_LIST, KERNELS, TEXT_LIST, override, slot
from nanovllm_core.structure import line, structure
from nanovllm_core.yamltext import KeyPath, Text, dump, parse, read


def _unchangeable(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(options))  # the defaults of a recipe are shared by all of them


@frozen(kw_only=True)
class Component:
    """A component as a recipe names it: `{use: NAME, ...its options}`, or the bare name."""

    use: str
    options: Mapping[str, Any] = field(factory=dict, converter=_unchangeable)
    at: KeyPath = field(default=(), eq=False, repr=False, metadata=INTERNAL)  # where in the recipe

    def to_data(self) -> Any:
        """The bare name when there are no options."""
        return {"use": self.use, **copy.deepcopy(dict(self.options))} if self.options else self.use


AUTO = Component(use="auto")
"""Let the plan choose among the installed components of the kind, and say why."""


@frozen(kw_only=True)
class Data:
    """The documents and how they become training sequences.

    path: file or folder of documents (sub-folders included); relative ones count from the recipe's folder
    readers: components that open files; `auto` chooses for each file
    extractors: components that find the text in a record; asked in order, the first answer wins; `auto` stands for all
      that are not named, by name
    max_seq_length: tokens of one training sequence
    concatenate_documents: join all documents into one stream before cutting, instead of cutting each by itself
    document_separator: text between documents when they are joined
    chunk_overlap: tokens that a chunk repeats from the one before; null: 128, or a quarter of max_seq_length if less
    min_chunk_size: tokens; where the rest of a document is shorter, its last chunk begins earlier, with context
    train_on_overlap: train tokens that two chunks share in both; otherwise the second has them as context only
    eval_fraction: share of the documents held out for evaluation; 0 turns evaluation off
    eval_max_tokens: an evaluation measures at most about this much of them, whole documents; null: all
    workers: threads that tokenise; null: one a core
    on_error: what a record or file that cannot be read does: `strict` stops the run with its place, `skip` leaves it out
      and lists it in skipped.jsonl in output_dir
    max_errors: how many such may be skipped: a count, or a share below 1 of all records (one is always allowed); where the
      rest of a file is left out, so that records cannot be counted, also of all bytes
    """

    path: str | None = None
    readers: tuple[Component, ...] = (AUTO,)
    extractors: tuple[Component, ...] = (Component(use="fields"),)
    max_seq_length: int = field(default=2048, validator=at_least(2))
    concatenate_documents: bool = False
    document_separator: str = "\n\n---\n\n"
    chunk_overlap: int | None = field(default=None, validator=at_least(0))
    min_chunk_size: int = field(default=100, validator=at_least(1))
    train_on_overlap: bool = False
    eval_fraction: float = field(default=0.05, validator=[at_least(0), below(1)])
    eval_max_tokens: int | None = field(default=None, validator=at_least(1))
    workers: int | None = field(default=None, validator=at_least(1))
    on_error: Literal["strict", "skip"] = "strict"
    max_errors: int | float = field(default=0.01, validator=above(0))

    @max_errors.validator
    def _count_or_share(self, attribute: Any, value: float) -> None:
        if value > 1 and value != int(value):
            raise ValueError(f"got {value}, a count is a whole number and a share is below 1")

    @property
    def allowed_errors(self) -> int | float:
        """The budget; 0 where `on_error` is strict."""
        return self.max_errors if self.on_error == "skip" else 0

    @chunk_overlap.validator
    def _shorter_than_a_chunk(self, attribute: Any, value: int | None) -> None:
        if value is not None and value >= self.max_seq_length:
            raise ValueError(f"got {value}, below max_seq_length ({self.max_seq_length})")


@frozen(kw_only=True)
class Generate:
    """What the model is asked.

    The bounds are those of `inference.params.SamplingParams`, known here before anything is trained.

    prompts: texts to continue when training is over
    steps: optimizer steps between samples: the prompts are continued during training too; 0: only when it is over
    max_tokens: longest answer
    temperature: 0 takes the likeliest token, higher is more varied
    top_k: draw from this many likeliest tokens; null: all
    top_p: draw from the likeliest tokens that together have this probability
    min_p: draw from the tokens that have at least this share of the likeliest one's probability
    repetition_penalty: above 1, tokens that prompt or answer have become less likely; 1: none
    seed: of the draws
    stop: texts that end an answer, and are left out of it
    """

    prompts: tuple[str, ...] = ()
    steps: int = field(default=0, validator=at_least(0))
    max_tokens: int = field(default=64, validator=at_least(1))
    temperature: float = field(default=0.7, validator=[at_least(0), below(math.inf)])
    top_k: int | None = field(default=None, validator=at_least(1))
    top_p: float = field(default=0.95, validator=Bounds(low=0, high=1, open_low=True))
    min_p: float = field(default=0.0, validator=Bounds(low=0, high=1))
    repetition_penalty: float = field(default=1.0, validator=[above(0), below(math.inf)])
    seed: int = field(default=42, validator=[at_least(0), below(2**63)])
    stop: tuple[str, ...] = field(default=())

    @stop.validator
    def _not_empty(self, attribute: Any, value: tuple[str, ...]) -> None:
        if "" in value:
            raise ValueError("got '', an empty text, which would end every answer before it begins")


def _for_all(kernels: Mapping[str, Component]) -> dict[str, Component]:
    return {"*": AUTO, **kernels}


@frozen(kw_only=True)
class Recipe:
    """One training run, or one model to generate with.

    data: the documents
    tokenizer: component; null or `auto`: the one that goes with the model, with the options that `auto` carries
    model: component: `preset` for a new model, `pretrained` to fine-tune one
    kernels: operation -> component, `"*"` for all others; one component alone serves all
    parallel: component that spreads the model over devices
    train: optimisation, evaluation, saving
    generate: what the model is asked
    callbacks: components that watch the run
    output_dir: folder of the result; relative ones count from the recipe's folder
    """

    data: Data = field(factory=Data)
    tokenizer: Component | None = None
    model: Component | None = None
    kernels: Mapping[str, Component] = field(factory=dict, converter=_for_all)
    parallel: Component = AUTO
    train: Train = field(factory=Train)
    generate: Generate = field(factory=Generate)
    callbacks: tuple[Component, ...] = (Component(use="progress"), Component(use="metrics"))
    output_dir: str = "./checkpoints"
    text: Text = field(factory=Text, eq=False, repr=False, metadata=INTERNAL)  # places, for messages
    base: Path = field(factory=Path.cwd, eq=False, repr=False, metadata=INTERNAL)  # relative paths count from here

    @classmethod
    def load(cls, path: Path | str, sets: Sequence[str] = ()) -> Recipe:
        """The recipe of a YAML file, changed by `KEY=VALUE` settings. Raises RecipeError with every problem's place."""
        return structured(read(path), Path(path).absolute().parent, sets)

    @classmethod
    def from_text(cls, text: str, file: str = "recipe", base: Path | None = None, sets: Sequence[str] = ()) -> Recipe:
        """The recipe of a YAML text; `file` names it in messages, relative paths count from `base`."""
        return structured(parse(text, file), base or Path.cwd(), sets)

    @classmethod
    def from_data(cls, data: Mapping[str, Any], base: Path | None = None, sets: Sequence[str] = ()) -> Recipe:
        """The recipe of plain data, as YAML would hold it."""
        return structured(Text(copy.deepcopy(dict(data))), base or Path.cwd(), sets)

    def to_data(self) -> dict[str, Any]:
        """Every key as plain data; a component without options is its bare name. `from_data` is the inverse."""
        return {a.name: _plain(getattr(self, a.name)) for a in attrs.fields(Recipe) if a.metadata != INTERNAL}

    def to_yaml(self) -> str:
        """Every key as YAML. `from_text` is the inverse."""
        return dump(self.to_data())


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return value.to_data()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return _plain(value["*"]) if list(value) == ["*"] else {key: _plain(item) for key, item in value.items()}
    if attrs.has(type(value)):
        return {a.name: _plain(getattr(value, a.name)) for a in attrs.fields(type(value))}
    return value


# ---------------------------------------------------------------- from data to classes


def structured(text: Text, base: Path, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of data with its places. Raises RecipeError with every problem's place."""
    if text.data is None:
        text = attrs.evolve(text, data={})
    if not isinstance(text.data, dict):
        raise RecipeError(f"{text.place(())}: got {shown(text.data)}; a recipe is a mapping: data, model, train, ...")
    for setting in sets:
        text = override(text, setting, Recipe)
    problems: list[str] = []
    data = _with_components(text.data, (), text, problems)
    try:
        recipe = structure(data, Recipe, places=text)
    except RecipeError as e:
        raise RecipeError("\n".join([*problems, str(e)])) from None
    if problems:
        raise RecipeError("\n".join(problems))
    return attrs.evolve(recipe, text=text, base=base)


def _with_components(data: dict[str, Any], path: KeyPath, text: Text, problems: list[str]) -> dict[str, Any]:
    """`data` with a Component wherever the recipe holds one, and lists where one item may stand for itself."""
    made: dict[str, Any] = {}
    for key, value in data.items():
        at, kind = (*path, key), slot((*path, key))
        if kind == COMPONENT:
            optional = key in ("tokenizer", "model")
            made[key] = None if value is None and optional else _component(value, at, text, problems)
        elif kind == COMPONENT_LIST:
            many = isinstance(value, list)
            items = value if many else [value]
            made[key] = tuple(_component(v, (*at, i) if many else at, text, problems) for i, v in enumerate(items))
        elif kind == KERNELS:
            made[key] = _kernels(value, at, text, problems)
        elif kind == TEXT_LIST and isinstance(value, str):
            made[key] = [value]
        elif not path and isinstance(value, dict):
            made[key] = _with_components(value, at, text, problems)
        else:
            made[key] = value
    return made


def _component(value: Any, at: KeyPath, text: Text, problems: list[str]) -> Component:
    name = value.get("use") if isinstance(value, dict) else value
    if isinstance(name, str) and name:
        options = {k: v for k, v in value.items() if k != "use"} if isinstance(value, dict) else {}
        return Component(use=name, options=options, at=at)
    if not isinstance(value, dict):
        problem = f"got {shown(value)}, expected a component's name or `{{use: NAME, ...its options}}`"
    elif "use" in value:
        at, problem = (*at, "use"), f"got {shown(name)}, expected a component's name"
    else:
        given = next((f" ({k!r} is given{nearest(k, ['use'])})" for k in value), "")
        problem = f"'use' is missing: the component's name{given}"
    problems.append(line(problem, at, text))
    return AUTO


def _kernels(value: Any, at: KeyPath, text: Text, problems: list[str]) -> dict[str, Component]:
    if not isinstance(value, dict) or "use" in value:
        return {"*": _component(value, at, text, problems)}
    known = (*OPERATIONS, *GENERATION, *JOINED, "*")
    for key in value:
        if key not in known:
            what = f"unknown operation {key!r}{nearest(key, known)} (allowed: {', '.join(known)})"
            problems.append(line(what, (*at, key), text, key=True))
    return {key: _component(v, (*at, key), text, problems) for key, v in value.items() if key in known}
