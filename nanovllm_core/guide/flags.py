"""`nanovllm train` and `train.py`: the guide's configuration as a JSON file and as flags, which go over the file's keys."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, get_args

from nanovllm_core.errors import RecipeError, nearest
from nanovllm_core.guide.keys import TABLE, config_text
from nanovllm_core.launch import add_flags
from nanovllm_core.options import is_union
from nanovllm_core.yamltext import Place, Text, parse

DESCRIPTION = """\
Train by a configuration of the guide: one flat JSON object, whose keys are also flags here. It is another spelling of a
recipe, which --print-recipe shows; `nanovllm run` does everything that this does.

examples:
  nanovllm train --config finetune_config.json
  nanovllm train --config scratch_config.json --train_from_scratch --model_size medium
  nanovllm train --model_name_or_path Qwen/Qwen3-0.6B --dataset_path ./my_documents
  torchrun --nproc_per_node=4 train.py --config config.json
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """With a flag for every key."""
    made = argparse.ArgumentParser(
        prog=prog, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="a JSON file of the keys below; of several the last says",
    )
    made.add_argument("--print-recipe", action="store_true", help="print the recipe that this means, and do nothing")
    add_flags(made)
    keys = made.add_argument_group("keys")
    for key, meaning in TABLE.items():
        default = meaning.default
        alone = bool in (meaning.type, *get_args(meaning.type))  # the flag by itself means true
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if alone else {}
        said = json.dumps(default, ensure_ascii=False)
        keys.add_argument(
            f"--{key}",
            metavar="VALUE",
            default=None,
            help=f"{meaning.help} (default: {said})".replace("%", "%%"),
            **switch,
        )
    return made


def config_of(args: argparse.Namespace) -> Text:
    """The configuration of file and flags together. Raises RecipeError."""
    data, places, keys = {}, {}, {}
    for file in args.config:
        text = config_text(file)
        data.update(text.data)
        places.update(text.places)
        keys.update(text.keys)
    for key, meaning in TABLE.items():
        given = getattr(args, key)
        if given is None:
            continue
        text_only = meaning.type is str or (is_union(meaning.type) and str in get_args(meaning.type))
        data[key] = given if text_only else parse(given, f"--{key}").data
        places[(key,)] = keys[(key,)] = Place(f"--{key}")
    return Text(data, " ".join(args.config) or "nanovllm train", places, keys)


def parsed(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The flags. An unknown one is an error with the nearest, as argparse cannot say. Raises RecipeError."""
    made = parser(prog)
    args, left = made.parse_known_args(argv)
    if left:
        known = [option for action in made._actions for option in action.option_strings]
        flag = left[0].partition("=")[0]
        raise RecipeError(f"{flag}: no such flag{nearest(flag, known)}; `{prog} --help` lists all")
    return args
