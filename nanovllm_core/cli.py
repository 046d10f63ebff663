"""The command line: `nanovllm init | run | explain | estimate | train | analyze | plugins | schema | new | generate | chat |
serve`.

Thin: parse, call the core, print. A user's mistake is one message on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nanovllm_core import commands as do
from nanovllm_core.errors import NanoError
from nanovllm_core.generation import flags
from nanovllm_core.launch import add_flags, add_nproc
from nanovllm_core.server.command import add_parser as add_serve

START = """\
start here:
  nanovllm init demo                      a folder of real documents and a commented recipe
  nanovllm run demo/recipe.yaml           build a vocabulary, train, evaluate, export, generate
  nanovllm explain demo/recipe.yaml       what a recipe would do: every choice and its reason
  nanovllm analyze my_documents           what a folder holds, and what would be skipped
  nanovllm generate demo/model --prompt "The"
  nanovllm generate demo/model --file in.jsonl --out out.jsonl
  nanovllm chat FOLDER                    talk with a model that has a chat template
  nanovllm serve demo/model               OpenAI's API on this machine, and a page to chat
  nanovllm plugins                        readers, tokenizers, models, ... that are installed
  nanovllm new readers NAME               a plugin of your own to edit, with its tests
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

PLUGINS = """\
The state of a component is `ok`, `collision` (write distribution/name in a recipe) or `broken` (with the reason; fatal only
for a recipe that names it). --check loads each in a process of its own: it survives what ends or hangs a process, tells
seconds and what heavy packages came along, and exits with 1 when a component is broken.
"""

SCHEMA = """\
What a recipe may hold, with every installed component and its options: an editor with a YAML language server completes
and checks by it. Save it, and name it in the recipe's first line:

  nanovllm schema > recipe.schema.json
  # yaml-language-server: $schema=recipe.schema.json

Make it anew after installing or removing components. Broken ones are left out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what a terminal's encoding cannot
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # what is short is written only here
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _let_go()
        return 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or e.filename is not None:
            raise
        print(f"nanovllm: the output cannot be written: {e.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds is not tried again at exit
        return 2


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if words[:1] == ["train"]:  # its flags are keys, which are looked up only then
        args = argparse.Namespace(version=False, command=do.train, prog="nanovllm train")
    else:
        args = parser.parse_args(words)
    args.again = words  # for processes that this one starts
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
    except KeyboardInterrupt:
        print("nanovllm: interrupted", file=sys.stderr)
        return 130


def _let_go() -> None:
    """Point a stream whose reader went away at nothing, so that what it still holds is not tried again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def entry() -> NoReturn:
    """The installed command: `main`, and an end even where a stranger's import has left a thread running."""
    code = main()
    left = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if left:
        os._exit(code)
    # An interruption that fell inside an exec of text (dataclasses do that) is remembered by Python, though it was caught:
    # `python -m` would end by the signal instead of with our code. Another exec forgets it.
    exec("")
    sys.exit(code)


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
    init.set_defaults(command=do.init)

    run = commands.add_parser("run", help="do what a recipe says", formatter_class=raw, description=RUN)
    explain = commands.add_parser("explain", help="show what a recipe would do, and why", formatter_class=raw)
    estimate = commands.add_parser(
        "estimate", help="how much memory a recipe's training needs, by what holds it", formatter_class=raw
    )
    estimate.add_argument("--json", action="store_true", help="one object of bytes, for tools")
    for sub, command in ((run, do.run), (explain, do.explain), (estimate, do.estimate)):
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
        sub.add_argument(
            "--locked",
            type=Path,
            metavar="FILE",
            help="refuse to go on if anything that changes the result differs from this plan.lock.json of an earlier run",
        )
        (add_flags if sub is run else add_nproc)(sub)
        sub.set_defaults(command=command)

    commands.add_parser("train", help="train by a configuration of the guide: a JSON file, flags (`train --help`)")

    analyze = commands.add_parser("analyze", help="show what a folder of documents holds, and what is wrong with it")
    analyze.add_argument("path", help="a file or folder of documents")
    analyze.add_argument(
        "--tokenizer", metavar="FOLDER_OR_NAME", help="count tokens too: a tokenizer's folder or hub name"
    )
    analyze.add_argument("--json", action="store_true", help="all figures as one object, for tools")
    analyze.set_defaults(command=do.analyze)

    plugins = commands.add_parser(
        "plugins",
        help="list the installed components, or show one and its options",
        formatter_class=raw,
        description=PLUGINS,
    )
    plugins.add_argument(
        "component", nargs="?", metavar="KIND:NAME", help="show this component's options, e.g. tokenizers:bpe"
    )
    plugins.add_argument("--json", action="store_true", help="a list of objects, for tools")
    plugins.add_argument("--check", action="store_true", help="load each component in a process of its own")
    plugins.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="longest import of one component (default: 10)",
    )
    plugins.set_defaults(command=do.plugins)

    schema = commands.add_parser(
        "schema", help="print the JSON Schema of recipes, for editors", formatter_class=raw, description=SCHEMA
    )
    schema.set_defaults(command=do.schema)

    new = commands.add_parser("new", help="write a plugin of your own: a distribution to edit, with its tests")
    new.add_argument(
        "kind", metavar="KIND", help="readers, extractors, tokenizers, models, kernels, parallel or callbacks"
    )
    new.add_argument("name", metavar="NAME", help="what a recipe will write: letters, digits, - and _")
    new.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, help="a new or empty folder (default: nanovllm-NAME)"
    )
    new.set_defaults(command=do.new)

    flags.add(commands)
    add_serve(commands)
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


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


if __name__ == "__main__":
    entry()
