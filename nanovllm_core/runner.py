"""Plan -> Run: whose folder it is, which documents there are, and whether anything is left to do; `job` does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanovllm_core.corpus import count, phase, prepare
from nanovllm_core.errors import Interrupted, RefusedError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.job import Job, asked_length, say_finished
from nanovllm_core.lock import contents, identity, lock_of
from nanovllm_core.output import TOKENS, claimed, finished, locked_by, settle, tidy, write_lock
from nanovllm_core.plan import Plan
from nanovllm_core.training.stop import StopRequest


def run(plan: Plan, callbacks: Sequence[object] = (), stop: StopRequest | None = None) -> Path:
    """Do what the plan says; the folder of the finished model.

    Callbacks are the recipe's, then these (instances with `@hookimpl` methods of `hookspecs.Callbacks`). The same run
    again goes on from its newest sound checkpoint, or, when it is finished, changes nothing. Raises Interrupted when
    `stop.ask()` was called meanwhile, after saving what there is to save.
    """
    try:
        return _run(plan, callbacks, stop or StopRequest())
    except Interrupted:
        raise Interrupted(f"stopped; the same command {goes_on(plan.output_dir)}") from None


def goes_on(folder: Path) -> str:
    """What the same command will do after an interruption."""
    saved = [int(p.name[11:]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    return f"goes on from checkpoint-{max(saved)}" if saved else "begins anew: no checkpoint was saved yet"


def _run(plan: Plan, callbacks: Sequence[object], stop: StopRequest) -> Path:
    events, folder = plan.events((*callbacks, _Heeds(stop))), plan.output_dir
    if plan.machine.world_size > 1:
        raise RefusedError(f"parallel: {plan.machine.world_size} processes were started; runs use one for now")
    with claimed(folder) as claim:
        events.run_started(plan=plan)
        for text in (*plan.data.left_out, plan.emulated, plan.tight):
            if text:
                events.note(text=text)
        with phase(events, "hashing the documents") as tell:
            fingerprint = plan.data.documents.fingerprint(tell)
        with phase(events, "hashing the model") as tell:
            named = contents(plan, tell)
        who = identity(plan, fingerprint, named)
        documents = count(plan, fingerprint, folder / TOKENS, events)  # a bad one stops the run before anything moves
        length = asked_length(plan)
        found = settle(claim, who, length, lambda text: events.note(text=text))
        done = finished(folder)
        if done is not None and done[1] == length and (found is None or found[1].step == done[0]):
            if locked_by(folder) != who:
                write_lock(folder, lock_of(plan, who, fingerprint, named))
            say_finished(events, done[0], folder)
        else:
            write_lock(folder, lock_of(plan, who, fingerprint, named))
            corpus = prepare(plan, fingerprint, named, documents, folder / TOKENS, events)
            Job(plan, corpus, who, events, stop).run(found)
        tidy(folder)
    events.run_finished(output_dir=folder)
    return folder


class _Heeds:
    """Ends a run that reads or tokenises at its next report."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    @hookimpl
    def phase_progress(self) -> None:
        self.stop.check()
