"""The guide's configuration as another spelling of a recipe: one flat mapping, key by key.

Most keys are the recipe's own, of `data` and `train`, without their section. The others are listed in `MEANT`. A key that
begins with `_` is a comment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import frozen

from nanovllm_core.errors import RecipeError, nearest
from nanovllm_core.optimisation import Train
from nanovllm_core.options import default_of, describe, options_of, shown, type_text
from nanovllm_core.recipe import Data, Recipe, structured
from nanovllm_core.yamltext import KeyPath, Place, Text, read

TAKEN = frozenset({"path", "workers", "readers", "extractors", "unfreeze"})
"""Keys of `data` and `train` that have another name here, or need a recipe."""


@frozen
class Meaning:
    """A key, and what it says in a recipe."""

    recipe: str  # where it goes, for people
    type: Any
    default: Any
    help: str


MEANT: Mapping[str, Meaning] = MappingProxyType({
    "model_name_or_path": Meaning("model.path", str | None, None, "model to fine-tune: a folder or a hub name"),
    "train_from_scratch": Meaning("model.use: preset", bool, False, "a new model from random weights"),
    "model_size": Meaning("model.size", str | None, None, "of a new model: tiny, small, medium or large"),
    "vocab_size": Meaning("tokenizer.size", int | None, None, "of a new model; null: by the amount of text"),
    "dataset_path": Meaning("data.path", str | None, None, "file or folder of documents"),
    "output_dir": Meaning("output_dir", str, "./checkpoints", "folder of the result"),
    "tensor_parallel_size": Meaning("parallel.tensor", int | None, None, "devices that share each matrix"),
    "data_parallel_size": Meaning("parallel.data", int | None, None, "copies of the model"),
    "use_multi_document": Meaning("(a folder implies it)", bool, False, "accepted: every folder is read whole"),
    "analyze_documents": Meaning("nanovllm analyze", bool, False, "show what the documents hold before training"),
    "dataloader_num_workers": Meaning("data.workers", int | None, None, "threads that tokenise; 0: one"),
})  # fmt: skip


def _all() -> Mapping[str, Meaning]:
    found = dict(MEANT)
    for section, cls in (("data", Data), ("train", Train)):
        docs = {option.name: option.doc for option in describe(cls)}
        for a, kind in options_of(cls):
            if a.name not in TAKEN:
                found[a.name] = Meaning(f"{section}.{a.name}", kind, default_of(cls, a), docs[a.name])
    return MappingProxyType(found)


TABLE = _all()
"""Every key, the recipe's own among them."""


def config_text(path: Path | str) -> Text:
    """The JSON (or YAML) of a configuration file, with the place of each key. Raises RecipeError."""
    text = read(path, tabs=True)
    if not isinstance(text.data, dict):
        raise RecipeError(
            f"{text.place(())}: got {shown(text.data)}; a configuration is an object: model_name_or_path, ..."
        )
    return text


def recipe_of(text: Text, base: Path) -> Recipe:
    """The recipe that a flat configuration means; relative paths count from `base`. Raises RecipeError.

    What is missing (documents, a model) is met by whoever makes a plan of it.
    """
    flat, known = dict(text.data), TABLE
    problems = [
        f"{text.key_place((key,))}: unknown key {key!r}{nearest(str(key), known)}; `nanovllm train --help` lists all"
        for key in flat
        if key not in known and not str(key).startswith("_")
    ]
    for key, meaning in MEANT.items():
        if key in flat and not _fits(flat[key], meaning.type):
            problems.append(f"{text.place((key,))}: {key}: got {shown(flat[key])}, expected {type_text(meaning.type)}")
    if problems:
        raise RecipeError("\n".join(problems))
    out = _Recipe(text)
    for key in flat:
        if key in known and key not in MEANT:
            out.put(tuple(known[key].recipe.split(".")), flat[key], key)
    out.give(flat, "dataset_path", ("data", "path"))
    if (workers := flat.get("dataloader_num_workers")) is not None and workers < 0:
        raise RecipeError(
            f"{text.place(('dataloader_num_workers',))}: dataloader_num_workers: got {workers}, at least 0"
        )
    out.give(flat, "dataloader_num_workers", ("data", "workers"), lambda n: max(1, n))
    out.give(flat, "output_dir", ("output_dir",))
    _model(out, flat)
    _parallel(out, flat)
    return structured(Text(out.data, text.file, out.places, out.keys), base)


def of_one_road(text: Text) -> None:
    """Raises RecipeError for keys of a new model in a configuration that does not ask for one, or of both roads."""
    if text.data.get("train_from_scratch"):
        if text.data.get("model_name_or_path") is not None:
            raise RecipeError(
                f"{text.key_place(('model_name_or_path',))}: model_name_or_path is a pretrained model, and train_from_scratch asks "
                "for a new one: leave one of the two out"
            )
        return
    for key in ("model_size", "vocab_size"):
        if text.data.get(key) is not None:
            raise RecipeError(
                f"{text.key_place((key,))}: {key} is of a new model; set train_from_scratch to true, or leave it out to "
                "fine-tune"
            )


def complete(text: Text) -> None:
    """Raises RecipeError with what a run needs and is not there, by the names that the user writes."""
    of_one_road(text)
    flat = text.data
    missing = [] if flat.get("dataset_path") is not None else ["dataset_path (the file or folder of your documents)"]
    if not flat.get("train_from_scratch") and flat.get("model_name_or_path") is None:
        missing.append("model_name_or_path (to fine-tune), or train_from_scratch: true (a new model)")
    if missing:
        raise RecipeError(f"{text.place(())}: missing: {'; '.join(missing)}")


class _Recipe:
    """A recipe's data under way, each value with the place that it came from."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.data: dict[str, Any] = {}
        self.places: dict[KeyPath, Place] = {(): text.place(())}
        self.keys: dict[KeyPath, Place] = {}

    def put(self, path: KeyPath, value: Any, key: str) -> None:
        """Set a value of the recipe, which the configuration's `key` says."""
        within = self.data
        for part in path[:-1]:
            within = within.setdefault(str(part), {})
        within[str(path[-1])] = value
        self.places[path], self.keys[path] = self.text.place((key,)), self.text.key_place((key,))

    def give(
        self, flat: Mapping[str, Any], key: str, path: KeyPath, change: Callable[[Any], Any] = lambda v: v
    ) -> None:
        if flat.get(key) is not None:
            self.put(path, change(flat[key]), key)


def _model(out: _Recipe, flat: Mapping[str, Any]) -> None:
    scratch = flat.get("train_from_scratch", False)
    name, size, vocabulary = (flat.get(key) for key in ("model_name_or_path", "model_size", "vocab_size"))
    if scratch:
        key = "model_size" if size is not None else "train_from_scratch"
        out.put(("model",), {"use": "preset", "size": size or "small"}, key)
        if vocabulary is not None:
            out.put(("tokenizer",), {"use": "auto", "size": vocabulary}, "vocab_size")
        return
    if name is not None:
        out.put(("model",), {"use": "pretrained", "path": name}, "model_name_or_path")


def _parallel(out: _Recipe, flat: Mapping[str, Any]) -> None:
    tensor, data = flat.get("tensor_parallel_size"), flat.get("data_parallel_size")
    for key in ("tensor_parallel_size", "data_parallel_size"):
        if (value := flat.get(key)) is not None and value < 1:
            raise RecipeError(f"{out.text.place((key,))}: {key}: got {value}, at least 1")
    key = "tensor_parallel_size" if tensor is not None else "data_parallel_size"
    if data == 1 and (tensor or 1) == 1:
        out.put(("parallel",), "single", key)
    elif data is not None:
        out.put(("parallel",), {"use": "mesh", "data": data, "tensor": tensor or 1}, key)
    elif tensor is not None and tensor > 1:
        out.put(("parallel",), {"use": "tensor", "size": tensor}, key)


def _fits(value: Any, tp: Any) -> bool:
    return isinstance(value, tp) and (tp is bool or not isinstance(value, bool))
