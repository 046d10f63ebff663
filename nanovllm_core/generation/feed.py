"""Questions through the engine without a pause: as some are answered, more are asked, so that it is always full.

A batch that waits for its longest answer would leave most of the model idle at its end; here only the whole input has an
end. Memory holds the questions under way and one chunk that waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attrs import define, frozen

from nanovllm_core.chat import chat_ids
from nanovllm_core.contracts import Tokenizer
from nanovllm_core.errors import GenerationError, ModelError, NanoError
from nanovllm_core.generation.questions import Question, listed
from nanovllm_core.inference.engine import Engine
from nanovllm_core.inference.sequence import Prompt
from nanovllm_core.inference.sequence import Sequence as Answer

CHUNK = 256  # answers that are asked for together


@frozen
class Progress:
    """What one forward of the model brought."""

    tokens: int
    over: list[tuple[Question, list[Answer]]]


@define
class _Open:
    question: Question
    answers: list[Answer]
    left: int


def answered(engine: Engine, questions: Iterable[Question]) -> Iterator[Progress]:
    """Ask and answer them all; those that are over come as they end. Nobody else may use the engine meanwhile."""
    waiting = iter(chunks(questions))
    under_way: dict[Answer, _Open] = {}
    more = True
    while True:
        while more and len(under_way) < engine.scheduler.most + CHUNK:
            chunk = next(waiting, None)
            if chunk is None:
                more = False
                break
            asked = engine.answers([prompt_of(q, engine.tokenizer) for q in chunk], [q.params for q in chunk])
            for question, answers in zip(chunk, asked, strict=True):
                opened = _Open(question, answers, len(answers))
                under_way.update(dict.fromkeys(answers, opened))
                engine.enqueue(answers)
        if not under_way:
            return
        found = Progress(0, [])
        stepped = engine.step()
        for answer in stepped:
            if answer.error is not None:
                raise answer.error
            if answer.finish_reason is not None:
                opened = under_way.pop(answer)
                opened.left -= 1
                if not opened.left:
                    found.over.append((opened.question, opened.answers))
        yield Progress(len(stepped), found.over)


def chunks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Questions of about so many answers together."""
    chunk, answers = list[Question](), 0
    for question in questions:
        chunk.append(question)
        answers += question.params.n
        if answers >= CHUNK:
            yield chunk
            chunk, answers = [], 0
    if chunk:
        yield chunk


def prompt_of(question: Question, tokenizer: Tokenizer) -> Prompt:
    """What the engine reads. Raises GenerationError with the place for a conversation that it cannot."""
    if not question.chat:
        return question.asked  # type: ignore[return-value]  # no conversation
    try:
        return chat_ids(tokenizer, question.asked)  # type: ignore[arg-type]  # a conversation
    except ModelError as e:
        help_ = "" if tokenizer.has_chat_template else "; give `prompt` instead of `messages`"
        raise GenerationError(f"{question.place}: messages: {e}{help_}") from e
    except NanoError as e:
        raise GenerationError(f"{question.place}: {e}") from e


def refuse_unanswerable(engine: Engine, questions: Iterable[Question]) -> None:
    """Look at every prompt as the engine will. Raises GenerationError with the first that cannot be answered."""
    problems: list[str] = []
    for chunk in chunks(questions):
        try:
            _ask(engine, chunk)
        except NanoError:
            for question in chunk:
                try:
                    _ask(engine, [question])
                except NanoError as e:
                    text = str(e).removeprefix("prompt 0: ").removeprefix("text 0: ")
                    problems.append(text if text.startswith(question.place) else f"{question.place}: {text}")
    if problems:
        raise GenerationError(listed(problems))


def _ask(engine: Engine, chunk: Sequence[Question]) -> None:
    engine.answers([prompt_of(q, engine.tokenizer) for q in chunk], [q.params.single(0) for q in chunk])
