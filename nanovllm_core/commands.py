"""What each command of `nanovllm` does: call the core, print; the exit code. Imports stand inside, so that help is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from nanovllm_core.errors import Elsewhere, Interrupted, NanoError

if TYPE_CHECKING:
    from nanovllm_core.machine import Machine
    from nanovllm_core.plan import Plan
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Row
    from nanovllm_core.training.world import World


def init(args: argparse.Namespace) -> int:
    from nanovllm_core.demo import init

    recipe, documents, characters = init(args.folder)
    print(f"{documents} documents ({characters:,} characters) in {args.folder / 'documents'}, and the recipe {recipe}")
    print(f"next: nanovllm run {recipe}")
    return 0


def _make_plan(args: argparse.Namespace, machine: Callable[[], Machine] | None = None) -> Plan:
    from nanovllm_core.recipe import Recipe

    return _plan_of(args, Recipe.load(args.recipe, sets=args.sets), machine)


def _plan_of(args: argparse.Namespace, recipe: Recipe, machine: Callable[[], Machine] | None) -> Plan:
    from nanovllm_core.plan import make_plan
    from nanovllm_core.registry import Registry

    plan = make_plan(recipe, Registry.from_environment(without=args.without), machine)
    if args.locked:
        from nanovllm_core.lock import refuse_drift

        refuse_drift(plan, args.locked)
    return plan


def run(args: argparse.Namespace) -> int:
    return _ranks(args, lambda machine: _make_plan(args, machine))


def train(args: argparse.Namespace) -> int:
    """By the guide's configuration."""
    from nanovllm_core.guide.flags import config_of, parsed
    from nanovllm_core.guide.keys import complete, of_one_road, recipe_of

    args = argparse.Namespace(**{**vars(parsed(args.again[1:], args.prog)), "again": args.again})
    config = config_of(args)
    recipe = recipe_of(config, Path.cwd())
    if args.print_recipe:
        of_one_road(config)
        print(recipe.to_yaml(), end="")
        return 0
    complete(config)
    analyzed = bool(config.data.get("analyze_documents"))
    args.without, args.locked = (), None

    def plan(machine: Callable[[], Machine]) -> Plan:
        return _plan_of(args, recipe, machine)

    def analyze_first() -> None:
        from nanovllm_core.analyze import analyze_document_collection, table

        assert recipe.data.path is not None
        print(table(analyze_document_collection(recipe.data.path)), flush=True)

    return _ranks(args, plan, analyze_first if analyzed else None)


def _ranks(
    args: argparse.Namespace, plan: Callable[[Callable[[], Machine]], Plan], before: Callable[[], None] | None = None
) -> int:
    """Run a plan in this process as one of the run's, or start `--nproc` of them; the first does `before`."""
    from nanovllm_core.launch import launch, wanted
    from nanovllm_core.training.launched import AGAIN, end_rank, last_word, orphaned, speaks

    try:
        if wanted(args.nproc, args.max_restarts):
            return launch(args.again, args.nproc, args.max_restarts)
    except Elsewhere as e:
        if speaks():
            print(f"nanovllm: {e}", file=sys.stderr)
        return AGAIN
    from nanovllm_core.training.world import World

    try:
        world = World.join()
    except Elsewhere as e:
        if str(e) and not orphaned():
            last_word(str(e))
        return end_rank(AGAIN)
    try:
        if before is not None and world.first:
            before()
        return _run(plan, world, args.profile)
    except NanoError as e:
        if world.size == 1:
            raise
        world.fail(e)
        text = str(e) if isinstance(e, Elsewhere) else f"rank {world.rank}: {e}"
        if text and world.may_speak():
            last_word(text)
        return end_rank(AGAIN if isinstance(e, Elsewhere) and e.lost else 2)


def _run(make_plan: Callable[[Callable[[], Machine]], Plan], world: World, profile: bool) -> int:
    from nanovllm_core.interrupt import Interrupt
    from nanovllm_core.training.stop import StopRequest

    stop = StopRequest()
    hint = "the same command goes on from the newest checkpoint, if there is one"
    with Interrupt(stop, hint, world) as interrupt:
        from nanovllm_core.machine import Machine

        plan = make_plan(lambda: _smallest(Machine.detect(), world))
        from nanovllm_core.heap import WORTH, give_back
        from nanovllm_core.runner import goes_on, run

        if plan.machine.device == "cpu" and plan.memory.total >= WORTH:
            give_back()
        interrupt.begun = True
        try:
            run(plan, stop=stop, world=world, profile=profile)
        except Interrupted as e:
            said = str(e)
        except KeyboardInterrupt:
            said = f"interrupted; the same command {goes_on(plan.output_dir)}"
        else:
            return 0
        if world.first:
            print(f"nanovllm: {said}", file=sys.stderr)
        return interrupt.code


def _smallest(machine: Machine, world: World) -> Machine:
    """The machine as every rank plans for it: with the memory of the rank that has least."""
    return evolve(machine, memory=min(world.everyone("memory", machine.memory)))


def _planned(args: argparse.Namespace) -> Plan:
    """The plan of the first of `--nproc` processes, where that is given."""
    if args.nproc is None:
        return _make_plan(args)
    from nanovllm_core.launch import process_count
    from nanovllm_core.machine import Machine

    return _make_plan(args, lambda: Machine.detect(process_count(args.nproc)))


def explain(args: argparse.Namespace) -> int:
    plan = _planned(args)
    from nanovllm_core.explain import explain

    print(explain(plan), end="")
    return 0


def estimate(args: argparse.Namespace) -> int:
    plan = _planned(args)
    from nanovllm_core.memory_table import estimate, estimate_data

    print(json.dumps(estimate_data(plan)) if args.json else estimate(plan).rstrip("\n"))
    return 0


def analyze(args: argparse.Namespace) -> int:
    from nanovllm_core.analyze import analyze_document_collection, said, table

    found = analyze_document_collection(args.path, args.tokenizer, progress=said(sys.stderr))
    print(json.dumps(found, indent=1) if args.json else table(found), end="\n" if args.json else "")
    return 0


def plugins(args: argparse.Namespace) -> int:
    from nanovllm_core.registry import Registry, rows_table

    registry = Registry.from_environment(timeout=args.timeout)
    rows: Sequence[Row]
    if args.check:
        from nanovllm_core.check import check

        entries = registry.entries if args.component is None else [registry.labelled(args.component)]
        rows = check(registry, entries)
    elif args.component is not None and args.json:
        rows = [registry.row(registry.labelled(args.component))]
    elif args.component is not None:
        from nanovllm_core.manual import describe_component

        print(describe_component(registry, args.component), end="")
        return 0
    else:
        rows = registry.rows()
    if args.json:
        from attrs import asdict

        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(rows_table(rows), end="")
    return 1 if args.check and any(row.state == "broken" for row in rows) else 0


def schema(args: argparse.Namespace) -> int:
    from nanovllm_core.registry import Registry
    from nanovllm_core.schema import schema

    made, broken = schema(Registry.from_environment())
    print(json.dumps(made, indent=1, ensure_ascii=False))
    if broken:
        print(f"nanovllm: {len(broken)} broken components are left out; `nanovllm plugins` says why", file=sys.stderr)
    return 0


def new(args: argparse.Namespace) -> int:
    from nanovllm_core.scaffold import new

    written = new(args.kind, args.name, args.folder)
    print(f"{args.kind}:{args.name} is in {written.component}: edit it there. Next:")
    print("".join(f"  {step}\n" for step in written.next_steps), end="")
    return 0
