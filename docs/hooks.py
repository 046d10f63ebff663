"""Writes the hooks of every kind into plugins.md, from the code: `python docs/hooks.py` after a change of hookspecs.py.

A hook without a docstring, or one whose arguments or answer have no type, stops it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from nanovllm_core.hookspecs import SPECS

PAGE = Path(__file__).with_name("plugins.md")
BEGIN, END = "<!-- hooks: written by docs/hooks.py -->", "<!-- end of hooks -->"


def rendered() -> str:
    """The part of the page between the marks."""
    return "\n".join(line for kind in SPECS for line in _kind(kind, SPECS[kind]))


def _kind(kind: str, spec: type) -> Iterator[str]:
    yield f"### {kind}\n\n{_documented(kind, spec)}\n"
    for name, hook in vars(spec).items():
        if inspect.isfunction(hook) and not name.startswith("_"):
            parameters = list(inspect.signature(hook).parameters.values())[1:]
            answer = inspect.signature(hook).return_annotation
            for what, found in (*((p.name, p.annotation) for p in parameters), ("answer", answer)):
                if found is inspect.Parameter.empty:
                    raise SystemExit(f"hookspecs.py: {kind}.{name}: its {what} has no type")
            given = ", ".join(f"{p.name}: {p.annotation}" for p in parameters)
            yield f"- `{name}({given}) -> {answer}`  \n  {_documented(f'{kind}.{name}', hook)}"
    yield ""


def _documented(name: str, what: object) -> str:
    text = inspect.getdoc(what) if not isinstance(what, type) else what.__doc__
    if not (text or "").strip():
        raise SystemExit(f"hookspecs.py: {name} has no docstring")
    return re.sub(r"\s+", " ", text or "").strip()


def updated(page: str) -> str:
    """The page with its hooks as the code has them."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{rendered()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")
