"""`nanovllm chat`: a real process at a pseudo-terminal, and behind a pipe."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from nanovllm_core import LLM, Machine, SamplingParams
from nanovllm_core.generation.questions import seed_of
from nanovllm_core.generation.talk import SHOWN

COMMAND = [sys.executable, "-m", "nanovllm_core.cli", "chat"]
GREEDY = ("--temperature", "0", "--max-tokens", "8")
WAIT = 120  # seconds until a test gives up


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *words, term="dumb"):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": term, "PYTHONIOENCODING": "utf-8", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.ours, self.all = ours, b""

    def write(self, text):
        os.write(self.ours, text.encode())

    def until(self, pattern, press=""):
        """What is shown up to a pattern, which may span lines; the rest is looked at the next time.

        press: written now, and again every few seconds: Python does not hear of Ctrl-C that comes just before it waits for a key.
        """
        deadline = time.monotonic() + WAIT
        self.write(press)
        while (found := re.search(pattern, self.all.decode("utf-8", "replace"), re.DOTALL)) is None:
            left = max(0, deadline - time.monotonic())
            ready = select.select([self.ours], [], [], min(5, left) if press else left)[0]
            if not ready and press and left:
                self.write(press)
                continue
            assert ready, self.all
            try:
                self.all += os.read(self.ours, 4096)
            except OSError:  # closed
                raise AssertionError(self.all) from None
        text = self.all.decode("utf-8", "replace")
        self.all = text[found.end() :].encode()
        return text[: found.end()]

    def end(self):
        """The exit code, and what was shown last."""
        shown = self.all
        try:
            while part := os.read(self.ours, 4096):
                shown += part
        except OSError:
            pass
        os.close(self.ours)
        return self.process.wait(WAIT), shown.decode("utf-8", "replace")


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def talking():
    """Starts `nanovllm chat` at a terminal."""
    started = []

    def talking(*words, **options):
        started.append(Terminal(*words, **options))
        started[-1].until(r"\n> ")
        return started[-1]

    yield talking
    for terminal in started:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


def pipe(*words, text):
    given = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*COMMAND, *map(str, words)], input=given, capture_output=True, timeout=WAIT, check=False)
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def llm(small_model):
    return LLM(small_model, machine=Machine())


def answers(llm, *messages, system=None, **params):
    """What the model answers to messages in turn."""
    said = [] if system is None else [{"role": "system", "content": system}]
    for turn, message in enumerate(messages):
        said.append({"role": "user", "content": message})
        more = {"seed": seed_of(params["seed"], turn)} if "seed" in params else {}
        [answer] = llm.chat(said, SamplingParams(**{"temperature": 0, "max_tokens": 8, **params, **more}))
        said.append({"role": "assistant", "content": answer["text"]})
    return [m["content"] for m in said if m["role"] == "assistant"]


def shown(text):
    return text.translate(SHOWN).replace("\n", "\r\n")


def test_lines_of_a_pipe_are_messages(small_model, llm):
    code, out, err = pipe(small_model, *GREEDY, text="the river\n\nold mills\r\n/reset\nthe river")
    first, second = answers(llm, "the river", "old mills")
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert "line 1: the answer ends at --max-tokens 8" in err
    words = ("--seed", 4, "--max-tokens", 8, "--system", "Ä, kurz.", "--top-p", 1, "--temperature", 1)
    code, out, _ = pipe(small_model, *words, text="the river\nold mills\n/exit\nmore\n")
    wanted = answers(llm, "the river", "old mills", system="Ä, kurz.", seed=4, temperature=1)
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in wanted))


def test_conversations_stream(llm):
    asked = [[{"role": "user", "content": text}] for text in ("the river", "old mills")]
    params = SamplingParams(temperature=0, max_tokens=8)
    texts = ["", ""]
    for piece in llm.chat(asked, params, stream=True):
        texts[piece["prompt"]] += piece["text"]
    assert texts == [answer["text"] for answer in llm.chat(asked, params)]
    assert "".join(piece["text"] for piece in llm.chat(asked[0], params, stream=True)) == texts[0]


def test_a_conversation_at_a_terminal(small_model, llm, talking):
    terminal = talking(small_model, *GREEDY)
    first, second = answers(llm, "the river", "old mills")
    terminal.write("the river\n")
    assert f"the river\r\n{shown(first)}\r\n" in terminal.until(r"\n> ")
    terminal.write("old mills\n")
    assert f"old mills\r\n{shown(second)}\r\n" in terminal.until(r"\n> ")
    terminal.write("/reset\n")
    terminal.until(r"> ")
    terminal.write("old mil\x7f\x7f\x7fmills\n")
    assert f"{shown(answers(llm, 'old mills')[0])}\r\n" in terminal.until(r"\n> ")
    terminal.write("/rest\n")
    assert "nanovllm: got /rest, allowed: /exit, /help, /reset" in terminal.until(r"\n> ")
    terminal.write("\x04")
    code, last = terminal.end()
    assert code == 0
    assert "Traceback" not in last


def test_several_lines_are_one_message(small_model, llm, talking):
    wanted = shown(answers(llm, "the river\nold mills\n\nfish")[0])
    for term, text in (
        ("dumb", "the river\nold mills\n\nfish\n"),
        ("xterm", "\x1b[200~the river\nold mills\n\nfish\x1b[201~\n"),
        ("dumb", '"""\nthe river\nold mills\n\nfish\n"""\n'),
    ):
        terminal = talking(small_model, *GREEDY, term=term)
        terminal.write(text)
        assert f"{wanted}\r\n" in terminal.until(r"the answer ends at --max-tokens 8\)\r\n")
        terminal.until(r"> ")
        terminal.write("/exit\n")
        code, last = terminal.end()
        assert code == 0
        assert "the answer ends" not in last


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(small_model, talking):
    terminal = talking(small_model, "--seed", 1, "--max-tokens", 4000, "--ignore-eos")
    for _ in range(3):
        terminal.write("the river\n")
        terminal.until(r"the river\r\n.{20}")
        terminal.write("\x03")
        assert terminal.until(r"\n> ").endswith(" (ended)\r\n> ")
    terminal.write("no message")
    terminal.until(
        "no message"
    )  # read: a terminal forgets what nobody has read when Ctrl-C comes, and readline waits for it
    assert "(/exit or Ctrl-D leaves)" in terminal.until(r"leaves\)\r\n.*> ", press="\x03")
    terminal.write("/exit\n")
    assert terminal.end()[0] == 0


def test_a_conversation_that_outgrows_the_model_is_told(small_model, llm, talking):
    words = (small_model, "--max-model-len", 60, "--temperature", 0, "--ignore-eos")
    code, out, err = pipe(*words, text="the river\nthe river\n")
    assert code == 2
    assert out.count("\n") >= 1
    assert "line 1: the conversation fills the model's 60 tokens; begin a new one with /reset" in err
    assert "nanovllm: line 2: with this message the conversation has " in err
    terminal = talking(*words)
    for _ in range(2):
        terminal.write("the river\n")
        assert "the conversation fills the model's 60 tokens" in terminal.until(r"/reset\)\r\n> ")
        terminal.write("old mills\n")
        assert "and the model takes 60 with the answer" in terminal.until(r"with /reset\r\n.*> ")
        terminal.write("/reset\n")
        terminal.until("> ")
    terminal.write("\x04")
    assert terminal.end()[0] == 0


def test_mistakes(small_model, tmp_path):
    code, out, err = pipe(small_model, "--top-p", 2, text="x\n")
    assert (code, out) == (2, "")
    assert err == "nanovllm: --top-p: got 2.0, allowed: above 0 and at most 1\n"
    code, out, err = pipe(small_model, *GREEDY, text=b"x\n\xe4\n")
    assert code == 2
    assert "nanovllm: line 2: byte 1 is not valid UTF-8" in err
    code, _, err = pipe(small_model, *GREEDY, text="/rset\n")
    assert (code, err) == (2, "nanovllm: line 1: got /rset, allowed: /exit, /help, /reset\n")
    other = shutil.copytree(small_model, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    refuses = config["chat_template"] + "{{ raise_exception('no system here') }}"
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": refuses}))
    code, _, err = pipe(other, "--system", "x", text="x\n")
    assert code == 2
    assert "no system here" in err
    del config["chat_template"]
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = pipe(other, text="x\n")
    assert code == 2
    assert f"{other}: the model has no chat template" in err
    assert f"`nanovllm generate {other} --prompt ...` continues a text" in err


def test_a_signal_ends_what_stands_behind_a_pipe(small_model):
    process = subprocess.Popen(
        [*COMMAND, small_model, "--max-tokens", "4000", "--ignore-eos"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write(b"the river\n")
    process.stdin.flush()
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert err.endswith(b"nanovllm: interrupted\n")
    assert b"Traceback" not in err


def test_an_answer_that_fails_is_told(small_model, tmp_path):
    broken = shutil.copytree(small_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [*COMMAND, broken], input="Hello\n", capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 2
    assert "line 1: the model's logits are not finite" in done.stderr
    assert "Traceback" not in done.stderr
