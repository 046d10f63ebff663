"""`nanovllm chat`: a conversation at a terminal, or with each line of a pipe as a message.

At a terminal a line ends a message, unless more of a paste is there already. Mistakes are told and the conversation goes
on; in a pipe, where nobody would mend them, the first one ends it.
"""

from __future__ import annotations

import argparse
import re
import select
import signal
import sys
from contextlib import nullcontext, suppress
from types import FrameType, MappingProxyType

from nanovllm_core.errors import GenerationError, NanoError
from nanovllm_core.generation.conversation import Conversation
from nanovllm_core.generation.flags import llm_of, sampling_of
from nanovllm_core.generation.leaving import Leaving

HELP = '/reset begins a new conversation, /exit or Ctrl-D leaves, Ctrl-C ends an answer; several lines stand between two of """'
COMMANDS = ("/exit", "/help", "/reset")
BLOCK = '"""'
PASTED = 0.05  # seconds within which the lines of a paste follow each other
# a terminal would obey them
SHOWN = MappingProxyType({c: "\ufffd" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"})


def talk(args: argparse.Namespace) -> int:
    """The command; its exit code."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    params = sampling_of(args)
    # An exception of a signal can be swallowed by what it falls into: behind a pipe nobody would press Ctrl-C again.
    with nullcontext() if terminal else Leaving(lambda: "interrupted"):
        conversation = Conversation(llm_of(args, args.max_model_len, 1), params, args.system, args.folder)
        return _at_terminal(conversation) if terminal else _from_pipe(conversation)


# ------------------------------------------------------------ a terminal


class _Ear:
    """Ctrl-C while an answer is made is noted, so that the model is left in order; a second one is an exception."""

    def __init__(self) -> None:
        self.heard = 0
        signal.signal(signal.SIGINT, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.heard += 1
        if self.heard > 1:  # the first did not help
            raise KeyboardInterrupt

    def message(self) -> str:
        """What the user writes: a line, the lines of a paste, or those between two marks. Ctrl-C raises KeyboardInterrupt."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return _message()
        finally:
            signal.signal(signal.SIGINT, self.hear)
            self.heard = 0


def _at_terminal(conversation: Conversation) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits its line and keeps a history then
    print(HELP)
    ear = _Ear()
    while True:
        try:
            text = ear.message()
            if not text.strip() or _obeyed(text.strip(), conversation):
                continue
            for piece in conversation.answer(text, lambda: ear.heard > 0):
                sys.stdout.write(piece.translate(SHOWN))
                sys.stdout.flush()
            print(" (ended)" if ear.heard else "")
            if conversation.note:
                print(f"({conversation.note})")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
        except UnicodeDecodeError as e:
            print(f"nanovllm: this is not {e.encoding} ({e.reason}); it was not sent", file=sys.stderr)
        except NanoError as e:
            print(f"nanovllm: {e}", file=sys.stderr)


def _message() -> str:
    text = input("> ")
    lines = list[str]()
    if text.strip() == BLOCK:
        while (line := input("")).strip() != BLOCK:
            lines.append(line)
        return "\n".join(lines)
    lines.append(text)
    with suppress(EOFError):
        while select.select([sys.stdin], [], [], PASTED)[0]:
            lines.append(input(""))
    return "\n".join(lines)


# ------------------------------------------------------------ a pipe


def _from_pipe(conversation: Conversation) -> int:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = _decoded(line)
            if not text.strip() or _obeyed(text.strip(), conversation):
                continue
            for piece in conversation.answer(text, lambda: False):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except EOFError:
            return 0
        except NanoError as e:
            raise GenerationError(f"line {number}: {e}") from e
        print(flush=True)
        if conversation.note:
            print(f"nanovllm: line {number}: {conversation.note}", file=sys.stderr)
    return 0


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise GenerationError(f"byte {e.start + 1} is not valid UTF-8 ({e.reason}); give the text as UTF-8") from None


# ------------------------------------------------------------ both


def _obeyed(text: str, conversation: Conversation) -> bool:
    """Whether the text was a command. Raises EOFError for /exit, GenerationError for one that is none."""
    if not re.fullmatch(r"/[a-z]+", text):
        return False
    if text == "/exit":
        raise EOFError
    if text == "/reset":
        conversation.reset()
    elif text == "/help":
        print(HELP, file=sys.stderr)
    else:
        raise GenerationError(f"got {text}, allowed: {', '.join(COMMANDS)}")
    return True
