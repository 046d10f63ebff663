"""The `tensorboard` callback: event files in the output folder, for `tensorboard --logdir OUTPUT_DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from nanovllm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from nanovllm_core import Plan

LEFT_OUT = ("total_steps",)  # the same in every line


@define
class _Log:
    """The one mutable thing: where to write, and the open file."""

    folder: Path | None = None
    writer: Any = None
    step: int = 0  # newest that was told


@frozen(kw_only=True, eq=False)
class TensorBoard:
    """Writes loss, learning rate, speed, evaluations and answers as TensorBoard event files.

    folder: where, within the output folder
    """

    folder: str = "tensorboard"
    _log: _Log = field(factory=_Log, init=False, repr=False)

    @hookimpl
    def run_started(self, plan: Plan) -> None:
        """Remember where; a file is opened by the first figure, after an older run's files were moved away."""
        self._close()
        self._log.folder = plan.output_dir / self.folder if plan.machine.rank == 0 else None

    @hookimpl
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add("train", step, metrics)

    @hookimpl
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add("eval", step, {name.removeprefix("eval_"): value for name, value in metrics.items()})

    @hookimpl
    def generated(self, prompt: str, text: str) -> None:
        if (writer := self._writer(self._log.step)) is not None:
            writer.add_text(f"generated/{prompt}", prompt + text, self._log.step)

    @hookimpl
    def run_finished(self, output_dir: Path) -> None:
        self._close()

    def _add(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        if (writer := self._writer(step)) is not None:
            self._log.step = step
            for name, value in metrics.items():
                if name not in LEFT_OUT:
                    writer.add_scalar(f"{group}/{name}", value, step)
            writer.flush()  # so that it can be watched, and that a kill loses nothing

    def _writer(self, step: int) -> Any:
        log = self._log
        if log.writer is None and log.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            log.writer = SummaryWriter(str(log.folder), purge_step=step)  # a resumed run takes its later steps again
        return log.writer

    def _close(self) -> None:
        if self._log.writer is not None:
            self._log.writer.close()
        self._log.writer = None
