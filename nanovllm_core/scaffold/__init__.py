"""`nanovllm new KIND NAME`: a distribution with one working component, for its author to edit.

What is written stands as text in `templates/`: files of every kind, then those of each. They are the shortest that pass
the conformance kit, not the fastest; the tests of this package write every kind and run what it wrote.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from types import MappingProxyType

from attrs import frozen

from nanovllm_core.errors import ComponentError, OutputError, UnknownComponent, listed, nearest
from nanovllm_core.hookspecs import SPECS
from nanovllm_core.recipe import AUTO
from nanovllm_core.registry import Registry

NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_-]{0,48}[A-Za-z0-9])?")
WORDS = MappingProxyType(
    {
        "readers": "reader",
        "extractors": "extractor",
        "tokenizers": "tokenizer",
        "models": "model",
        "kernels": "kernel",
        "parallel": "strategy",
        "callbacks": "callback",
    }
)
"""Kind -> what one of it is called, in names of classes and in sentences."""


@frozen
class Written:
    """What `new` wrote, and where its author goes on."""

    folder: Path
    component: Path
    next_steps: tuple[str, ...]


def new(kind: str, name: str, folder: Path | None = None) -> Written:
    """Write a distribution with one component of `kind` into a new or empty folder (`nanovllm-NAME` if none is given).

    Raises UnknownComponent for a kind that there is not, ComponentError for a name that cannot be used, OutputError for a
    folder that cannot.
    """
    if kind not in SPECS:
        raise UnknownComponent(f"new: {kind!r} is no kind of component{nearest(kind, SPECS)} (kinds: {listed(SPECS)})")
    names = _names(kind, name)
    folder = Path(names["distribution"]) if folder is None else folder
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"new: {folder} exists and is not an empty folder; name a new one")
        for path, text in _texts(kind, names):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as e:
        raise OutputError(
            f"new: {folder} cannot be written ({e.strerror or e}); name a folder where you may write"
        ) from e
    return Written(
        folder=folder,
        component=folder / "src" / names["package"] / "component.py",
        next_steps=(
            f"cd {shlex.quote(str(folder))}",
            "pip install -e '.[test]'",
            "pytest",
            f"nanovllm plugins {kind}:{name}",
        ),
    )


def _names(kind: str, name: str) -> dict[str, str]:
    """Everything that templates name, by its placeholder."""
    if not NAME.fullmatch(name):
        raise ComponentError(
            f"new: got the name {name!r}, allowed: up to 50 letters (a to z), digits, - and _, beginning with a letter and "
            "ending with a letter or digit; it is what recipes will write"
        )
    if name.lower() == AUTO.use:
        raise ComponentError(f"new: {name!r} is no name for a component: in a recipe it stands for any; choose another")
    for entry in Registry.from_environment().of_kind(kind):
        if entry.name == name:
            raise ComponentError(
                f"new: {entry.label} is installed, from {entry.distribution} {entry.version}: a recipe that names it could "
                "mean either; choose another name"
            )
    plain = re.sub(r"[-_]+", "_", name.lower())
    package = f"nanovllm_{plain}"
    if find_spec(package) is not None:
        raise ComponentError(f"new: a package {package} is installed already; choose another name")
    return {
        "name": name,
        "kind": kind,
        "word": WORDS[kind],
        "package": package,
        "distribution": package.replace("_", "-"),
        "cls": "".join(part.capitalize() for part in plain.split("_")) + WORDS[kind].capitalize(),
        "suffix": name.lower(),
        "version": version("nanovllm"),
    }


def _texts(kind: str, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Path and content of each file."""
    templates = files("nanovllm_core.scaffold") / "templates"
    package = f"src/{names['package']}"
    recipe = (templates / kind / "recipe.yaml.txt").read_text("utf-8")
    names = {**names, "recipe": Template(recipe).substitute(names).rstrip()}
    sources = {
        "pyproject.toml": templates / "pyproject.toml.txt",
        "README.md": templates / "README.md.txt",
        f"{package}/__init__.py": templates / "init.py.txt",
    }
    for source in (templates / kind).iterdir():
        name = source.name.removesuffix(".txt")
        if name.endswith(".py"):
            sources[f"tests/{name}" if name.startswith("test_") else f"{package}/{name}"] = source
    for path, source in sources.items():
        yield path, Template(source.read_text("utf-8")).substitute(names)
    yield f"{package}/py.typed", ""
