"""The command lines of `generate` and `chat`, and what their flags mean. Imports stand inside, so that help is instant."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_core.errors import GenerationError

if TYPE_CHECKING:
    from nanovllm_core.inference.params import SamplingParams
    from nanovllm_core.llm import LLM

GENERATE = """\
Continues prompts with a trained model: those of --prompt, printed, or those of a file:

  nanovllm generate FOLDER --file in.jsonl --out out.jsonl

A line of in.jsonl is {"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"token_ids": [...]}, with
"id" and sampling keys of its own (temperature, max_tokens, seed, ...) where wanted; a .txt file has one prompt a line.
The whole file is checked before the first answer is made. Each answer is a line of out.jsonl as soon as it is made; the
same command goes on after an interruption, and puts the lines in the order of the input when all are there.
"""

CHAT = """\
Each line is a message. Ctrl-C ends an answer, Ctrl-D or /exit leaves, /reset begins a new conversation. A message of
several lines stands between two lines of \"\"\", or is pasted as it is. Without a terminal every line of the standard input
is a message, and the answers alone are printed.
"""


def add(commands: Any) -> None:
    """Add both commands to the parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    generate = commands.add_parser(
        "generate", help="continue prompts with a trained model", formatter_class=raw, description=GENERATE
    )
    add_model(generate)
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    asked.add_argument("--file", type=Path, metavar="IN", help="prompts: a .jsonl file, or a .txt file of one a line")
    generate.add_argument(
        "--out", type=Path, metavar="OUT.jsonl", help="write the answers there, and go on with what is missing"
    )
    _sampling(generate, max_tokens=128)
    generate.add_argument("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    generate.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probability of each token, and of the K likeliest ones"
    )
    add_batch_size(generate)
    generate.add_argument(
        "--json", action="store_true", help="one object a line: prompt, text, token_ids, finish_reason"
    )
    generate.set_defaults(command=_generate)

    chat = commands.add_parser("chat", help="talk with a trained model", formatter_class=raw, description=CHAT)
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    _sampling(chat, max_tokens=1024)
    chat.set_defaults(command=_chat)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that opens a model to generate with, for `llm_of`."""
    parser.add_argument("folder", help="a run's output_dir, any model folder of a supported family, or a hub name")
    parser.add_argument(
        "--model", default="auto", help="who opens the folder, as in a recipe: NAME or {use: NAME, ...} (default: auto)"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument(
        "--kernels", default="auto", help="as in a recipe: NAME or {OPERATION: NAME, ...} (default: auto)"
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    parser.add_argument(
        "--kv-cache-tokens", type=int, metavar="TOKENS", help="room of the cache (default: what memory allows)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE",
        help="of a GPU's memory, for weights and cache (default: 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N",
        help="processes that hold the model together, each on a GPU or a share of the cores (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-lookup", type=int, metavar="TOKENS",
        help="guess so many from what followed the same words before, and check them (default: 8 on a CPU; 0: none)",
    )  # fmt: skip
    parser.add_argument("--enforce-eager", action="store_true", help="on a GPU: no CUDA graphs")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=int, metavar="ANSWERS", help="made at once (default: 256 on a GPU, 64 on a CPU)"
    )


def _sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    add = parser.add_argument
    add("--max-tokens", type=int, default=max_tokens, help=f"longest answer (default: {max_tokens})")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    add("--top-k", type=int, help="choose among the k likeliest (default: all)")
    add("--top-p", type=float, default=0.95, help="choose among the likeliest that hold p together (default: 0.95)")
    add("--min-p", type=float, default=0.0, help="not what is less likely than p times the likeliest (default: 0)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what was said is less likely (default: 1)")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--stop", action="append", default=[], help="end before this text; may be given several times")
    add("--stop-token-id", type=int, action="append", default=[], help="end at this token too; several times")
    add("--ignore-eos", action="store_true", help="go on after the model's end tokens")


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """What the flags ask for. Raises GenerationError with the flag that is wrong."""
    from nanovllm_core.inference.params import SamplingParams

    given = vars(args)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "stop", "seed", "ignore_eos")
    more = {name: given[name] for name in ("n", "logprobs") if name in given}
    try:
        return SamplingParams(**{name: given[name] for name in names}, **more, stop_token_ids=tuple(args.stop_token_id))
    except GenerationError as e:
        raise GenerationError(_flagged(e)) from None


def _flagged(error: GenerationError) -> str:
    """What is wrong with an argument, told of its flag; None, which none can be given as, is left out."""
    told = re.sub(r"^(?:SamplingParams|LLM): (\w+)", lambda found: _flag(found[1]), str(error))
    return told.replace("allowed: None, or ", "allowed: ") if told.startswith("--") else told


def _flag(name: str) -> str:
    return "--" + {"stop_token_ids": "stop-token-id"}.get(name, name.replace("_", "-"))


def llm_of(args: argparse.Namespace, max_model_len: int | None = None, batch_size: int | None = None) -> LLM:
    """The model that the flags name. Raises GenerationError with the flag that is wrong."""
    from nanovllm_core.llm import LLM
    from nanovllm_core.yamltext import parse

    names = (
        "dtype",
        "kv_cache_tokens",
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "prompt_lookup",
        "enforce_eager",
    )
    more = {name: vars(args)[name] for name in names}
    try:
        llm = LLM(
            args.folder, model=parse(args.model, "--model").data, kernels=parse(args.kernels, "--kernels").data,
            max_model_len=max_model_len, batch_size=batch_size, **more,
        )  # fmt: skip
    except GenerationError as e:
        raise GenerationError(_flagged(e)) from e
    most = llm.plan.shape.max_positions
    if max_model_len is None and llm.max_model_len < most:
        print(
            f"nanovllm: the cache holds {llm.max_model_len:,} tokens, so prompt and answer together have no more; the model takes "
            f"{most:,} (--max-model-len, --kv-cache-tokens)",
            file=sys.stderr,
        )
    return llm


def _generate(args: argparse.Namespace) -> int:
    from nanovllm_core.generation.generate import generate

    return generate(args)


def _chat(args: argparse.Namespace) -> int:
    from nanovllm_core.generation.talk import talk

    return talk(args)
