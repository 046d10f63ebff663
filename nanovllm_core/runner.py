"""Plan -> Run: whose folder it is, which documents there are, and whether anything is left to do; `job` does it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve

from nanovllm_core.contracts import Decision
from nanovllm_core.corpus import count, phase, prepare
from nanovllm_core.errors import Interrupted, LockError, OutputError, RefusedError
from nanovllm_core.files import LOCK, writing
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Callbacks, hookimpl
from nanovllm_core.job import Job, asked_length, say_finished
from nanovllm_core.lock import ELSEWHERE, contents, drift, identity, lock_of, read_lock
from nanovllm_core.memory_table import out_of_memory
from nanovllm_core.output import TOKENS, Claim, claimed, finished, locked_by, settle, tidy, write_lock
from nanovllm_core.plan import Plan, refuse_unordered
from nanovllm_core.training.checkpoint import State, read_state
from nanovllm_core.training.saver import pointed
from nanovllm_core.training.stop import StopRequest
from nanovllm_core.training.world import World


def run(
    plan: Plan,
    callbacks: Sequence[object] = (),
    stop: StopRequest | None = None,
    world: World | None = None,
    profile: bool = False,
) -> Path:
    """Do what the plan says; the folder of the finished model.

    Callbacks are the recipe's, then these (instances with `@hookimpl` methods of `hookspecs.Callbacks`); of several ranks
    the first has them. The same run again goes on from its newest sound checkpoint, or, when it is finished, changes
    nothing. Raises Interrupted when `stop.ask()` was called meanwhile, after saving what there is to save.

    `world`: who joined the run with this process (default: those whom torchrun tells of). Raises Elsewhere when another
    rank failed.

    `profile`: the first rank writes a trace of some steps and a table by phase into `profile/` of the output folder; the
    result is the same.
    """
    world = world or World.join()
    try:
        return _Run(plan, callbacks, stop or StopRequest(), world, profile).go()
    except Interrupted:
        raise Interrupted(f"stopped; the same command {goes_on(plan.output_dir)}") from None
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            world.refuse_broken()
        world.fail(e)
        raise


def goes_on(folder: Path) -> str:
    """What the same command will do after an interruption."""
    latest = pointed(folder)
    if latest is None:
        return "begins anew: no checkpoint was saved yet (a vocabulary and tokens that are complete are kept)"
    return f"goes on from {latest}"


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Memory that runs out within is told with what needs less. Raises TrainingError then."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch's OutOfMemoryError is one
        if told := out_of_memory(plan, e):
            raise told from e
        raise


class _Run:
    """A plan under way on one rank. The first rank keeps the output folder, reads and tokenises; the others open what it
    wrote. The first of each node hashes the documents there: all nodes must have the same."""

    def __init__(self, plan: Plan, callbacks: Sequence[object], stop: StopRequest, world: World, profile: bool) -> None:
        self.plan, self.stop, self.world, self.folder = plan, stop, world, plan.output_dir
        self.profile = profile
        heeds = _Heeds(stop, world)
        self.events = plan.events((*callbacks, heeds)) if world.first else bind(Callbacks, [("stop", heeds)])

    def go(self) -> Path:
        plan, world = self.plan, self.world
        if plan.machine.world_size != world.size:
            raise RefusedError(
                f"parallel: the plan is for {plan.machine.world_size} processes and {world.size} are here"
            )
        world.be_patient(plan.recipe.train.rank_timeout)
        with ExitStack() as stack:
            claim = stack.enter_context(claimed(self.folder)) if world.first else None
            self.events.run_started(plan=plan)
            for text in (*plan.data.left_out, plan.emulated, plan.tight):
                if text:
                    self.events.note(text=text)
            fingerprint, named = world.once_a_node("contents", self.contents)
            kept = world.from_first("step", lambda: self.kept_step(claim, fingerprint, named))
            if kept is not None:
                self.plan = plan = evolve(plan, sequences_per_step=Decision(kept, "as the run that goes on has had it"))
            who = identity(plan, fingerprint, named)
            lock = lock_of(plan, who, fingerprint, named)
            self.agree(lock)
            self.share()
            if world.first:  # a bad document stops the run before anything moves
                documents = count(plan, fingerprint, self.folder / TOKENS, self.events)
            found = world.from_first("found", lambda: self.settled(claim, who, lock))
            if found is not None:
                if not world.first:
                    world.hear("tokens")
                    documents = count(plan, fingerprint, self.folder / TOKENS, self.events)
                tokens = self.folder / TOKENS
                corpus = prepare(plan, fingerprint, named, documents, tokens, self.events, publish=world.first)
                if world.first:
                    world.tell("tokens", True)
                state = self.state_of(found)
                with world.connected(plan.machine.device) as at, explained(plan):
                    Job(plan, corpus, who, self.events, self.stop, world, at, self.profile).run(state)
            if world.first:
                tidy(self.folder)
            world.leave()
        self.events.run_finished(output_dir=self.folder)
        return self.folder

    def contents(self) -> tuple[str, dict[str, str]]:
        """Hashes of the documents and of the models that are named."""
        with phase(self.events, "hashing the documents") as tell:
            fingerprint = self.plan.data.documents.fingerprint(tell)
        with phase(self.events, "hashing the model") as tell:
            return fingerprint, contents(self.plan, tell)

    def kept_step(self, claim: Claim | None, fingerprint: str, named: dict[str, str]) -> int | None:
        """Sequences a step of the run in the folder, where this is the same on another number of data ranks."""
        assert claim is not None
        train, step = self.plan.recipe.train, self.plan.sequences_per_step.value
        try:
            there = read_lock(self.folder / LOCK)
            old, had = there["recipe"]["train"], int(there["sequences_per_step"])
            keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
            same = all(old.get(key) == getattr(train, key) for key in keys)
        except (LockError, KeyError, TypeError, ValueError, AttributeError):
            return None
        if not same or had == step or had < 1:
            return None
        plan = evolve(self.plan, sequences_per_step=Decision(had, ""))
        if identity(plan, fingerprint, named) != claim.owner:
            return None
        self.events.note(
            text=f"{had} sequences a step, as before; {step} would follow from the ranks that are here now"
        )
        refuse_unordered(plan.recipe, plan.model.layout, had)
        return had

    def agree(self, lock: dict[str, Any]) -> None:
        """Every rank would run what the first would. Raises LockError with what differs."""
        first = self.world.from_first("lock", lambda: lock)
        if lines := drift(first, lock, uncounted=ELSEWHERE):
            told = "".join(f"\n  {line}" for line in lines)
            raise LockError(
                f"what rank {self.world.rank} would run is not what rank 0 would (there); make them the same:{told}"
            )

    def share(self) -> None:
        """Every rank sees the first one's output folder. Raises OutputError."""
        world, folder = self.world, self.folder
        if world.size == 1:
            return
        mark = folder / f".{world.from_first('mark', self.marked)}"
        seen = world.everyone("seen", mark.exists())
        if world.first:
            mark.unlink()
        if not all(seen):
            raise OutputError(
                f"output_dir {folder}: rank {seen.index(False)} does not see what rank 0 writes there; name a folder on a file "
                "system that all nodes share"
            )

    def marked(self) -> str:
        """Write a file that no one else has."""
        name = uuid.uuid4().hex
        with writing(self.folder):
            (self.folder / f".{name}").touch()
        return name

    def settled(self, claim: Claim | None, who: str, lock: dict[str, Any]) -> int | None:
        """Whose the folder is: the step to go on from, 0 to begin; None where the run is finished."""
        assert claim is not None
        length = asked_length(self.plan)
        found = settle(claim, who, length, lambda text: self.events.note(text=text))
        done = finished(self.folder)
        over = done is not None and done[1] == length and (found is None or found[1].step == done[0])
        if not over or locked_by(self.folder) != who:
            write_lock(self.folder, lock)
        if over:
            assert done is not None
            say_finished(self.events, done[0], self.folder)
            return None
        return found[1].step if found else 0

    def state_of(self, step: int) -> tuple[Path, State] | None:
        """The checkpoint of a step, found sound by the first rank."""
        path = self.folder / f"checkpoint-{step}"
        return (path, read_state(path)) if step else None


class _Heeds:
    """Ends a run that reads or tokenises at its next report; training looks by itself."""

    def __init__(self, stop: StopRequest, world: World) -> None:
        self.stop, self.world = stop, world

    @hookimpl
    def phase_progress(self) -> None:
        if not self.stop.heeded:
            try:
                self.stop.check()
            except Interrupted:
                self.world.fail(KeyboardInterrupt())  # the others wait for this rank, and were not asked
                raise
