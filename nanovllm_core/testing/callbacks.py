"""Callbacks: every hook in the order of a run, in runs that follow each other, in runs that break off."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attrs import evolve

from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.testing.contract import Contract

if TYPE_CHECKING:
    from nanovllm_core.plan import Plan

RECIPE = """\
data: {path: documents, readers: [nanovllm/txt], extractors: [nanovllm/fields], max_seq_length: 64}
tokenizer: {use: nanovllm/bpe, size: 300}
model: {use: nanovllm/preset, size: tiny}
kernels: nanovllm/torch
parallel: nanovllm/single
train: {max_steps: 4}
callbacks: []
output_dir: OUTPUT
"""
METRICS = MappingProxyType({
    "loss": 2.5, "learning_rate": 1e-4, "gradient_norm": 0.7, "tokens_per_second": 900.0, "epoch": 0.5, "total_steps": 4,
})  # fmt: skip
HELD_OUT = MappingProxyType({"eval_loss": 2.25, "eval_perplexity": 9.49, "eval_bits_per_byte": 1.6})


class CallbackContract(Contract):
    """A callback: what it does is its own; that a run goes on with it is the contract."""

    kind = "callbacks"

    def test_a_whole_run(self, tmp_path: Path) -> None:
        self.run(self.plan(tmp_path))

    def test_two_runs_in_one_process(self, tmp_path: Path) -> None:
        component = self.make()
        for name in ("first", "second"):
            self.run(self.plan(tmp_path, name), component)

    def test_the_same_run_again(self, tmp_path: Path) -> None:
        """A run that is finished says so and ends; its callback is told of both ends only."""
        component, plan = self.make(), self.plan(tmp_path)
        self.run(plan, component)
        self.run(plan, component, steps=0)

    def test_a_run_that_breaks_off_and_goes_on(self, tmp_path: Path) -> None:
        component, plan = self.make(), self.plan(tmp_path)
        for steps in (-1, 2):  # in the first phase; after the second step
            self.run(plan, component, steps=steps, finish=False)
        self.run(plan, component, first=3)

    def test_figures_may_be_missing_or_new_or_infinite(self, tmp_path: Path) -> None:
        """`gradient_norm` may be absent, a later version may tell more, and a perplexity may overflow."""
        figures = {k: v for k, v in METRICS.items() if k != "gradient_norm"} | {"told_by_a_later_version": 1.0}
        self.run(
            self.plan(tmp_path), figures=figures, held_out={**HELD_OUT, "eval_perplexity": float("inf"), "new": 0.0}
        )

    def test_without_held_out_documents_or_prompts(self, tmp_path: Path) -> None:
        self.run(self.plan(tmp_path), held_out=None)

    def test_on_every_rank(self, tmp_path: Path) -> None:
        """All ranks call all callbacks; whether one of them speaks is the callback's to say (`plan.machine.rank`)."""
        component, plan = self.make(), self.plan(tmp_path)
        self.run(evolve(plan, machine=evolve(plan.machine, rank=1, local_rank=1, world_size=2)), component)
        self.run(plan, component)

    def test_writes_nowhere_but_into_the_output_folder(self, tmp_path: Path) -> None:
        plan = self.plan(tmp_path)
        before = _files(tmp_path)
        self.run(plan)
        strange = sorted(
            path for path in _files(tmp_path) - before if not (tmp_path / path).is_relative_to(plan.output_dir)
        )
        self.check(not strange, f"wrote {', '.join(strange)}", "relative paths count from plan.output_dir")

    # ------------------------------------------------------------ helpers

    def plan(self, folder: Path, output: str = "output") -> Plan:
        """A real plan, over one small document; nothing of it is run."""
        from nanovllm_core.machine import Machine
        from nanovllm_core.plan import make_plan
        from nanovllm_core.recipe import Recipe
        from nanovllm_core.registry import Registry

        (folder / "documents").mkdir(exist_ok=True)
        (folder / "documents" / "a.txt").write_text("The river runs past old mills. " * 9, "utf-8")
        (folder / "elsewhere").mkdir(exist_ok=True)
        recipe = Recipe.from_text(RECIPE.replace("OUTPUT", output), base=folder)
        plan = make_plan(recipe, Registry.from_environment(), Machine())
        plan.output_dir.mkdir(exist_ok=True)
        return plan

    def run(
        self,
        plan: Plan,
        component: Any = None,
        *,
        first: int = 1,
        steps: int = 4,
        finish: bool = True,
        figures: Mapping[str, float] = METRICS,
        held_out: Mapping[str, float] | None = HELD_OUT,
    ) -> None:
        """Call the hooks as a run of 4 steps does, as far as it gets. `steps` -1: it breaks off in its first phase."""
        events = self.bound(Callbacks, component)
        with chdir(plan.output_dir.parent / "elsewhere"):
            self.tell(events, "run_started", plan=plan)
            self.tell(
                events, "note", text="1 files of kind .png are left out: no reader takes them [/bold] {} %s \u2603"
            )
            phases = (("hashing the documents", "bytes"), ("reading", "bytes"), ("tokenising", "documents"))
            for phase, unit in phases if steps else ():
                for done in (0, 250_000, 500_000):
                    self.tell(events, "phase_progress", phase=phase, done=done, total=500_000, unit=unit)
                    if steps < 0:
                        return
            self.tell(events, "phase_progress", phase="hashing the model", done=0, total=0, unit="bytes")
            for step in range(first, steps + 1):
                self.tell(events, "step_done", step=step, metrics={**figures})
                if held_out is not None and step % 2 == 0:
                    self.tell(events, "evaluated", step=step, metrics={**held_out})
                if step % 2 == 0:
                    path = plan.output_dir / f"checkpoint-{step}"
                    path.mkdir(exist_ok=True)
                    self.tell(events, "checkpoint_saved", step=step, path=path)
            if finish and steps and held_out is not None:
                self.tell(
                    events, "generated", step=steps, prompt="The [red]river", text=" runs\n\n past \ufffd [/] mills"
                )
            if finish:
                self.tell(events, "run_finished", output_dir=plan.output_dir)

    def tell(self, events: Callbacks, hook: str, **arguments: Any) -> None:
        shown = {k: str(v)[:80] for k, v in arguments.items() if k != "plan"}
        try:
            answers = getattr(events, hook)(**arguments)
        except Exception as e:
            given = f"{hook} raised {type(e).__name__} ({e}) for {shown}"
            raise AssertionError(
                self.told(given, "what a callback raises stops the run: it raises nothing here")
            ) from e
        self.check(not answers, f"{hook} answered {answers!r}", "hooks of callbacks answer None")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
