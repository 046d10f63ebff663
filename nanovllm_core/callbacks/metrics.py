"""`metrics.jsonl`: one object a logged step and one an evaluation, for tools and plots; the newest by source beside it.

What is not finite is null: JSON has no NaN and no infinity, and what reads JSON elsewhere stops at them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from nanovllm_core.files import finite, sync, writing
from nanovllm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from nanovllm_core.plan import Plan

EVALUATION, SAMPLES = "evaluation.json", "samples.jsonl"


@define
class _File:
    path: Path | None = None
    begun: bool = False
    sampled: bool = False  # the samples are begun


def _plain_name(instance: Any, attribute: Any, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-][\w.-]*\.jsonl", value):
        raise ValueError(f"got {value!r}, allowed: a plain file name that ends in .jsonl, such as metrics.jsonl")
    if value == SAMPLES:
        raise ValueError(f"got {value!r}, where the model's answers go; name another")


@frozen(kw_only=True, eq=False)
class Metrics:
    """Writes metrics.jsonl into the output folder: one object a logged step or evaluation.

    The newest evaluation by source goes to evaluation.json, what the model answers the recipe's prompts to samples.jsonl.

    file: its name, which ends in .jsonl
    """

    file: str = field(default="metrics.jsonl", validator=_plain_name)
    _open: _File = field(factory=_File, init=False, repr=False)

    @hookimpl
    def run_started(self, plan: Plan) -> None:
        self._open.path = plan.output_dir / self.file if plan.machine.rank == 0 else None
        self._open.begun = self._open.sampled = False

    @hookimpl
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})

    @hookimpl
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, **metrics})
        self._sync()  # before the checkpoint of this step is written: what is found after a power cut is told of, too

    @hookimpl
    def checkpoint_saved(self) -> None:
        self._sync()  # where nothing is evaluated

    def _sync(self) -> None:
        path = self._open.path
        if path is not None and path.exists():
            with writing(path):
                sync(path)
                sync(path.parent)

    @hookimpl
    def evaluated_by_source(self, step: int, table: Sequence[Mapping[str, Any]]) -> None:
        if self._open.path is not None:
            path = self._open.path.with_name(EVALUATION)
            partial = path.with_name(f".{EVALUATION}.partial")
            with writing(path):
                partial.write_text(_json({"step": step, "sources": table}, indent=1) + "\n", encoding="utf-8")
                os.replace(partial, path)

    @hookimpl
    def generated(self, step: int, prompt: str, text: str) -> None:
        if self._open.path is not None:
            path, line = self._open.path.with_name(SAMPLES), {"step": step, "prompt": prompt, "text": text}
            self._open.sampled = _append(path, line, self._open.sampled)

    def _write(self, line: Mapping[str, float]) -> None:
        if self._open.path is not None:
            self._open.begun = _append(self._open.path, line, self._open.begun)


def _append(path: Path, line: Mapping[str, Any], begun: bool) -> bool:
    """Write a line; the first of a run drops what it says again: a resumed run takes its later steps again."""
    with writing(path):
        if not begun:
            _keep_before(path, line)
        with path.open("a", encoding="utf-8") as f:
            f.write(_json(line) + "\n")
    return True


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _keep_before(path: Path, line: Mapping[str, Any]) -> None:
    """Leave what came before the line alone; what cannot be read (a line that a kill cut short) goes too."""
    if path.exists():
        aside = path.with_name(f".{path.name}.partial")
        with path.open("rb") as old, aside.open("wb") as new:
            new.writelines(text.rstrip(b"\n") + b"\n" for text in old if _order(text) < _order(_json(line).encode()))
        sync(aside)
        os.replace(aside, path)  # so that a kill meets the old file or the new one, whole


def _order(text: bytes) -> tuple[float, bool]:
    """Lines of a run ascend by step; a step's evaluation comes after its loss."""
    try:
        line = json.loads(text.decode("utf-8"))
        return float(line["step"]), "eval_loss" in line
    except (ValueError, TypeError, LookupError):
        return float("inf"), True
