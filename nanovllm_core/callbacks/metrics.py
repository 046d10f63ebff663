"""`metrics.jsonl`: one object a logged step and one an evaluation, for tools and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from nanovllm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from nanovllm_core.plan import Plan


@define
class _File:
    path: Path | None = None
    begun: bool = False


@frozen(kw_only=True, eq=False)
class Metrics:
    """Writes metrics.jsonl into the output folder: one object a logged step or evaluation.

    file: its name
    """

    file: str = "metrics.jsonl"
    _open: _File = field(factory=_File, init=False, repr=False)

    @hookimpl
    def run_started(self, plan: Plan) -> None:
        self._open.path = plan.output_dir / self.file if plan.machine.rank == 0 else None
        self._open.begun = False

    @hookimpl
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})

    @hookimpl
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})

    def _write(self, line: Mapping[str, float]) -> None:
        path = self._open.path
        if path is None:
            return
        if not self._open.begun:  # a resumed run takes its later steps again: drop what they said before
            kept = [text for text in _lines(path) if json.loads(text)["step"] < line["step"]]
            path.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
            self._open.begun = True
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[str]:
    """The complete lines of the file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    *whole, _cut = path.read_text(encoding="utf-8").split("\n")
    return whole
