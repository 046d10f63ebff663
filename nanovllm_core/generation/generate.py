"""`nanovllm generate`: prompts of the command line, or of a file into a file that can be gone on with."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import asdict, define

from nanovllm_core import hub
from nanovllm_core.errors import GenerationError, OutputError
from nanovllm_core.files import digest
from nanovllm_core.generation import answers as kept
from nanovllm_core.generation.answers import Answers
from nanovllm_core.generation.feed import Progress, answered, refuse_unanswerable
from nanovllm_core.generation.flags import llm_of, sampling_of
from nanovllm_core.generation.leaving import Leaving
from nanovllm_core.generation.questions import Question, Questions
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.llm import LLM


def generate(args: argparse.Namespace) -> int:
    """The command; its exit code."""
    params = sampling_of(args)
    if args.file is None and args.out is None:
        llm = llm_of(args, args.max_model_len, args.batch_size)
        if len(args.prompt) * params.n == 1 and not args.json:
            return _as_it_is_made(llm, args.prompt[0], params)
        outputs = llm.generate(args.prompt, params)
        for i, output in enumerate(outputs):
            prompt = args.prompt[i // params.n]
            print(json.dumps({"prompt": prompt, **output}) if args.json else f"{prompt}{output['text']}\n")
        return 0
    questions = Questions(args.prompt if args.file is None else args.file, params)
    return _to_stdout(args, questions) if args.out is None else _to_file(args, questions)


def _as_it_is_made(llm: LLM, prompt: str, params: SamplingParams) -> int:
    """Print a prompt and its only answer."""
    pieces = llm.generate(prompt, params, stream=True)
    for text in itertools.chain([prompt], (piece["text"] for piece in pieces), ["\n\n"]):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _to_stdout(args: argparse.Namespace, questions: Questions) -> int:
    """Print each answer when it is made."""
    with Leaving(lambda: "stopped; with --out OUT.jsonl the same command could go on"):
        questions.check()
        llm = llm_of(args, args.max_model_len, args.batch_size)
        refuse_unanswerable(llm.engine, questions)
        with _told(questions.count, 0) as tell:
            for progress in _answered(llm, questions):
                for question, answers in progress.over:
                    line = kept.line_of(question.told, [a.output(llm.tokenizer) for a in answers])
                    sys.stdout.write(line.decode())
                    sys.stdout.flush()
                tell(progress.tokens, len(progress.over))
    return 0


@define
class _Word:
    """What is said when a signal comes."""

    out: Path
    answers: Answers | None = None

    def __call__(self) -> str:
        if self.answers is None or not self.answers.done:
            return f"stopped before the first answer; the same command begins {self.out}"
        done, count = self.answers.done, self.answers.count
        return f"stopped with {done:,} of {count:,} answers in {self.out}; the same command goes on"


def _to_file(args: argparse.Namespace, questions: Questions) -> int:
    """Answer what is missing in the file."""
    out: Path = args.out
    if args.file is not None and out.exists() and args.file.exists() and os.path.samefile(out, args.file):
        raise OutputError(f"--out: got {out}, which is the input; name another file")
    out = Path(os.path.realpath(out)) if out.is_symlink() else out
    word = _Word(out)
    with Leaving(word), kept.held(out):
        questions.check()
        here: dict[str, Any] = {
            "input": {"prompts": questions.count, "sha256": questions.sha256},
            "model": {"opened by": args.model, "sha256": content_of(args.folder)},
            "sampling": asdict(questions.params),
        }
        here = json.loads(json.dumps(here))  # as it is read back
        there = kept.begun(out)
        if args.max_model_len is not None:
            here["max_model_len"] = args.max_model_len
        if there is not None:
            kept.refuse_other(out, there, here)
        with Answers(out, questions.count).opened() as word.answers:
            _complete(args, questions, word.answers, here, there)
    return 0


def _complete(
    args: argparse.Namespace, questions: Questions, answers: Answers, here: dict[str, Any], there: dict[str, Any] | None
) -> None:
    """Make what is missing. `here`: what this command asks for, `there`: what the file was begun with."""
    out = answers.path
    if answers.cut:
        _say(f"{out}: cut {answers.cut:,} bytes of an unfinished last line")
    if answers.complete:
        answers.finish()
        print(f"{out}: finished, all {answers.count:,} prompts are answered")
        return
    llm = llm_of(args, (there or here).get("max_model_len"), args.batch_size)
    here |= {"max_model_len": llm.max_model_len, "dtype": llm.plan.dtype, "tokenizer": llm.tokenizer.fingerprint}
    if there is None:
        refuse_unanswerable(llm.engine, questions)
        kept.begin(out, {**here, "written for": {"input": questions.name, "model": args.folder}})
    else:
        kept.refuse_other(out, there, here)
        _say(f"{out}: going on behind {answers.done:,} of {answers.count:,} answers")
    _fill(llm, questions, answers)
    answers.finish()
    print(f"{out}: all {answers.count:,} prompts are answered")


def _say(text: str) -> None:
    print(f"nanovllm: {text}", file=sys.stderr)


def _fill(llm: LLM, questions: Questions, answers: Answers) -> None:
    missing = (q for q in questions if answers.missing(q.index))
    with _told(answers.count, answers.done) as tell:
        for progress in _answered(llm, missing):
            if progress.over:
                answers.add(
                    [
                        (q.index, kept.line_of(q.told, [a.output(llm.tokenizer) for a in found]))
                        for q, found in progress.over
                    ]
                )
            tell(progress.tokens, len(progress.over))


def _answered(llm: LLM, questions: Iterable[Question]) -> Iterator[Progress]:
    """As `answered`; memory that runs out is told with what needs less."""
    try:
        yield from answered(llm.engine, questions)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
            raise GenerationError(
                f"memory ran out ({str(e).splitlines()[0] if str(e) else 'MemoryError'}); set --batch-size (now "
                f"{llm.batch_size}) or --max-model-len (now {llm.max_model_len}) lower"
            ) from e
        raise


@contextmanager
def _told(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with answers and tokens a second, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    tokens, since, console = 0, time.monotonic(), Console(stderr=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=total, completed=done, speed="")

        def tell(more: int, over: int) -> None:
            nonlocal tokens
            tokens += more
            speed = f"{tokens / max(1e-9, time.monotonic() - since):,.0f} tokens/s"
            bar.update(task, advance=over, speed=speed)

        yield tell


def content_of(name: str) -> str:
    """sha256 over a model's weights and tokenizer; of a layout of its own, over every file there."""
    path = Path(name).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(p for p in path.rglob("*") if p.is_file())
        parts = [f"{p.relative_to(path)} {digest(p)}" for p in files]
    else:
        parts = [hub.fingerprint(name, weights=True), hub.fingerprint(name, weights=False)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
