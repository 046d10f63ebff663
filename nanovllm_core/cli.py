"""The command line: `nanovllm init | run | explain | analyze | plugins | generate`.

Thin: parse, call the core, print. A user's mistake is one message on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm_core.errors import NanoError

if TYPE_CHECKING:
    from nanovllm_core.plan import Plan

START = """\
start here:
  nanovllm init demo                      a folder of real documents and a commented recipe
  nanovllm run demo/recipe.yaml           build a vocabulary, train, evaluate, export, generate
  nanovllm explain demo/recipe.yaml       what a recipe would do: every choice and its reason
  nanovllm analyze my_documents           what a folder holds, and what would be skipped
  nanovllm generate demo/model --prompt "The"
  nanovllm plugins                        readers, tokenizers, models, ... that are installed
"""

RUN = """\
The recipe is one YAML file; relative paths in it count from its folder. Run the same command again after an
interruption: it goes on from the newest checkpoint. A finished run says so and changes nothing; change what is
learned (data, tokenizer, model, train) and the old contents of output_dir move to previous/.

examples:
  nanovllm run recipe.yaml --set train.learning_rate=1e-4 --set output_dir=other
  nanovllm run recipe.yaml --set model.size=small
  nanovllm run recipe.yaml --without readers:jsonl

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what a terminal's encoding cannot
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        import nanovllm_core

        print(f"nanovllm {nanovllm_core.__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(args.command(args))
    except NanoError as e:
        print(f"nanovllm: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("nanovllm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nanovllm", description="Train language models on your own documents.", epilog=START, formatter_class=raw
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    parser.set_defaults(command=None)

    init = commands.add_parser("init", help="make a folder of real documents and a recipe to start from")
    init.add_argument("folder", type=Path, help="a new or empty folder")
    init.set_defaults(command=_init)

    run = commands.add_parser("run", help="do what a recipe says", formatter_class=raw, description=RUN)
    explain = commands.add_parser("explain", help="show what a recipe would do, and why", formatter_class=raw)
    for sub, command in ((run, _run), (explain, _explain)):
        sub.keys = True
        sub.add_argument("recipe", type=Path, help="a YAML file")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="sets",
            help="change a key, e.g. train.seed=1",
        )
        sub.add_argument(
            "--without",
            action="append",
            default=[],
            metavar="KIND:NAME",
            help="do as if a component were not installed",
        )
        sub.set_defaults(command=command)

    analyze = commands.add_parser("analyze", help="show what a folder of documents holds, and what is wrong with it")
    analyze.add_argument("path", help="a file or folder of documents")
    analyze.add_argument(
        "--tokenizer", metavar="FOLDER_OR_NAME", help="count tokens too: a tokenizer's folder or hub name"
    )
    analyze.add_argument("--json", action="store_true", help="all figures as one object, for tools")
    analyze.set_defaults(command=_analyze)

    plugins = commands.add_parser("plugins", help="list the installed components, or show one and its options")
    plugins.add_argument(
        "component", nargs="?", metavar="KIND:NAME", help="show this component's options, e.g. tokenizers:bpe"
    )
    plugins.add_argument("--json", action="store_true", help="a list of objects, for tools")
    plugins.set_defaults(command=_plugins)

    generate = commands.add_parser("generate", help="continue prompts with a trained model")
    generate.add_argument("folder", help="a run's output_dir, any model folder of a supported family, or a hub name")
    generate.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be given several times"
    )
    generate.add_argument("--max-tokens", type=int, default=128, help="longest answer (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    generate.add_argument("--top-k", type=int, default=None, help="choose among the k likeliest (default: all)")
    generate.add_argument(
        "--top-p", type=float, default=0.95, help="choose among the likeliest that hold p together (default: 0.95)"
    )
    generate.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")
    generate.add_argument(
        "--stop", action="append", default=[], help="end before this text; may be given several times"
    )
    generate.add_argument(
        "--model", default="auto", help="who opens the folder, as in a recipe: NAME or {use: NAME, ...} (default: auto)"
    )
    generate.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    generate.add_argument(
        "--json", action="store_true", help="one object a line: prompt, text, token_ids, finish_reason"
    )
    generate.set_defaults(command=_generate)
    return parser


class _Parser(argparse.ArgumentParser):
    """Appends a recipe's keys to the help of the commands that take one, looked up only when someone asks for it."""

    keys = False

    def format_help(self) -> str:
        text = super().format_help()
        if self.keys:
            from nanovllm_core.manual import keys_help

            text += "\n" + keys_help()
        return text


def _init(args: argparse.Namespace) -> int:
    from nanovllm_core.demo import init

    recipe, documents, characters = init(args.folder)
    print(f"{documents} documents ({characters:,} characters) in {args.folder / 'documents'}, and the recipe {recipe}")
    print(f"next: nanovllm run {recipe}")
    return 0


def _make_plan(args: argparse.Namespace) -> Plan:
    from nanovllm_core.recipe import Recipe
    from nanovllm_core.registry import Registry

    recipe = Recipe.load(args.recipe, sets=args.sets)
    registry = Registry.from_environment(without=args.without)
    from nanovllm_core.machine import Machine  # torch comes only after the recipe is known to be well-formed
    from nanovllm_core.plan import make_plan

    return make_plan(recipe, registry, Machine.detect())


def _run(args: argparse.Namespace) -> int:
    plan = _make_plan(args)
    from nanovllm_core.runner import run

    try:
        run(plan)
    except KeyboardInterrupt:
        saved = sorted((int(p.name.partition("-")[2]) for p in plan.output_dir.glob("checkpoint-[0-9]*")), reverse=True)
        then = f"goes on from checkpoint-{saved[0]}" if saved else "begins anew: no checkpoint was saved yet"
        print(f"nanovllm: interrupted; the same command {then}", file=sys.stderr)
        return 130
    return 0


def _explain(args: argparse.Namespace) -> int:
    plan = _make_plan(args)
    from nanovllm_core.explain import explain

    print(explain(plan), end="")
    return 0


def _analyze(args: argparse.Namespace) -> int:
    from nanovllm_core.analyze import analyze_document_collection, said, table

    found = analyze_document_collection(args.path, args.tokenizer, progress=said(sys.stderr))
    print(json.dumps(found, indent=1) if args.json else table(found), end="\n" if args.json else "")
    return 0


def _plugins(args: argparse.Namespace) -> int:
    from nanovllm_core.registry import Registry

    registry = Registry.from_environment()
    if args.component:
        from nanovllm_core.manual import describe_component

        print(describe_component(registry, args.component), end="")
        return 0
    rows = registry.rows()
    if args.json:
        from attrs import asdict

        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    cells = [("KIND", "NAME", "FROM", "STATE", "SUMMARY")]
    cells += [(r.kind, r.name, f"{r.distribution} {r.version}".rstrip(), r.state, r.summary) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for row in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    return 0


def _generate(args: argparse.Namespace) -> int:
    from nanovllm_core.inference.sampling import SamplingParams
    from nanovllm_core.llm import LLM
    from nanovllm_core.yamltext import parse

    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed, stop=args.stop
    )  # fmt: skip
    llm = LLM(args.folder, model=parse(args.model, "--model").data, dtype=args.dtype)
    for prompt, output in zip(args.prompt, llm.generate(args.prompt, params), strict=True):
        print(json.dumps({"prompt": prompt, **output}) if args.json else f"{prompt}{output['text']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
