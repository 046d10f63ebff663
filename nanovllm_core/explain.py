"""`nanovllm explain`: a plan as text; each choice with its reason, each option with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from attrs import evolve

from nanovllm_core.memory_table import memory_lines, size_text
from nanovllm_core.negotiate import Candidate, Choice
from nanovllm_core.plan import Plan
from nanovllm_core.recipe import Recipe

NO_SUFFIX = "(no suffix)"


def explain(plan: Plan) -> str:
    """The plan for a person to read."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    recipe, model, machine = plan.recipe, plan.model, plan.machine
    shape, documents = model.shape, plan.data.documents
    sources = documents.all
    yield f"machine       {machine.device} ({machine.device_name}), {size_text(machine.memory)} free"
    yield f"output        {plan.output_dir} ({recipe.text.places.get(('output_dir',)) or 'default'})"
    yield f"documents     {sources.path}: {documents.files} files, {documents.bytes:,} bytes"
    yield "              " + ", ".join(f"{n} {suffix or NO_SUFFIX}" for suffix, n in sorted(sources.suffixes.items()))
    for text in plan.data.left_out:
        yield f"              {text}"
    yield "data.readers (each file goes to the one that accepts it with the highest priority)"
    for c in plan.data.readers:
        fault = dict(plan.data.faults).get(c.entry.name)
        yield from _candidate(
            c, recipe, f": {plan.data.taken.get(c.entry.full_name, 0)} files{f'; {fault}' if fault else ''}"
        )
    yield "data.extractors (the first that answers wins)"
    for c in plan.data.extractors:
        yield from _candidate(c, recipe)
    yield "data"
    yield from _settings("data", recipe, recipe.data, skip=("path", "readers", "extractors"))
    yield f"    chunk_overlap in use: {plan.chunk_overlap.value} ({plan.chunk_overlap.why})"
    yield from _choice(model.tokenizer, recipe)
    yield f"    vocabulary {model.vocabulary.value:,}: {model.vocabulary.why}"
    yield from _choice(model.model, recipe)
    heads = f"{shape.heads} heads ({shape.kv_heads} key/value) of {shape.head_dim}, " if shape.heads else ""
    yield (
        f"    {shape.family}: {shape.parameters:,} parameters, {shape.layers} layers, hidden {shape.hidden}, {heads}"
        f"embedding {'tied' if shape.tied else 'untied'}"
    )
    for what, why in shape.limits.items():
        yield f"    no {what}: {why}"
    yield from _choice(model.parallel, recipe)
    yield f"    layout: data {model.layout.data} x shard {model.layout.shard} x tensor {model.layout.tensor}"
    kept = "fp32 master weights" if recipe.train.master_weights else f"weights and moments in {model.weights} too"
    yield f"compute       {model.dtype} (train.mixed_precision: {recipe.train.mixed_precision}), {kept}"
    if plan.emulated:
        yield f"              {plan.emulated}"
    yield from _kernels(list(model.kernels.values()), recipe)
    yield "train"
    yield from _settings("train", recipe, recipe.train)
    yield f"    sequences in a step: {plan.sequences_per_step.value} ({plan.sequences_per_step.why})"
    yield "memory        estimated for training, on one device"
    yield from (f"    {text}" for text in memory_lines(plan))
    yield "generate"
    yield from _settings("generate", recipe, recipe.generate)
    yield "callbacks"
    for c in plan.callbacks:
        yield from _candidate(c, recipe)


def _choice(choice: Choice, recipe: Recipe) -> Iterator[str]:
    yield f"{choice.slot:<13} {choice.entry.name} from {_from(choice)}, by {choice.by}: {choice.why or 'named'}"
    for name, why in choice.refused:
        yield f"    not {name}: {why}"
    yield from _options(choice, recipe)


def _kernels(choices: Sequence[Choice], recipe: Recipe) -> Iterator[str]:
    """Operations that were decided alike share a line."""
    alike: dict[tuple[object, ...], list[Choice]] = {}
    for c in choices:
        alike.setdefault((c.entry.full_name, c.by, c.why, c.refused), []).append(c)
    for group in alike.values():
        operations = ", ".join(c.slot.removeprefix("kernels.") for c in group)
        yield from _choice(evolve(group[0], slot="kernels"), recipe)
        yield f"    for {operations}"


def _candidate(c: Candidate, recipe: Recipe, told: str = "") -> Iterator[str]:
    yield f"    {c.entry.name} from {_from(c)}{f': unusable: {c.unusable}' if c.unusable else told}"
    yield from _options(c, recipe)


def _from(item: Choice | Candidate) -> str:
    return f"{item.entry.distribution} {item.entry.version}".rstrip()


def _options(item: Choice | Candidate, recipe: Recipe) -> Iterator[str]:
    if attrs.has(type(item.component)):
        for a in attrs.fields(type(item.component)):
            if a.init:
                place = recipe.text.places.get((*item.at, a.name))
                yield f"        {a.name}: {_value(getattr(item.component, a.name))} ({place or 'default'})"


def _settings(section: str, recipe: Recipe, values: Any, skip: tuple[str, ...] = ()) -> Iterator[str]:
    given = recipe.text.places
    for a in attrs.fields(type(values)):
        if a.name not in skip:
            place = given.get((section, a.name))
            yield f"    {a.name}: {_value(getattr(values, a.name))} ({place or 'default'})"


def _value(value: Any) -> str:
    """As a recipe would write it."""
    return json.dumps(value, ensure_ascii=False, default=lambda v: attrs.asdict(v) if attrs.has(type(v)) else str(v))
