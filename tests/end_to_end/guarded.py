"""Opens hostile folders in this process under guard, for test_hostile_models.py and test_hostile_checkpoints.py.

    python guarded.py make FOLDER       documents, a small model `base` with tokenizer, and a finished run of 4 steps in `run`
    python guarded.py try FOLDER        each FOLDER/models/NAME is asked to generate, each FOLDER/runs/NAME to go on with its
                                        run; what came of it goes to FOLDER/outcomes.json

An audit hook notes what no folder may bring about: code from it, a shell, a pickle's find_class, a file opened outside.
What lies in FOLDER/outside is watched by inotify too, which also sees what Rust opens.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import struct
import sys
from pathlib import Path

from attrs import define, field

from nanovllm_core import LLM, Machine, Recipe, Registry, SamplingParams, hookimpl, make_plan, run
from nanovllm_core.errors import NanoError

SECONDS = 30
RECIPE = """\
data: {path: docs, max_seq_length: 64, chunk_overlap: 8, min_chunk_size: 8, eval_fraction: 0.25}
model: {use: pretrained, path: base}
train: {max_steps: 4, save_steps: 2, eval_steps: 2, per_device_train_batch_size: 2, logging_steps: 1}
callbacks: [metrics]
output_dir: run
"""
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
SYSTEM = (
    "/proc",
    "/sys",
    "/usr",
    "/lib",
    "/dev/null",
    "/dev/urandom",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl",
)


def make(folder: Path) -> None:
    import torch
    from nanovllm_tokenizers.bpe import train
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = random.Random(2)
    texts = [
        " ".join(draw.choices(["the", "river", "runs", "past", "old", "mills", "and", "a", "stone", "bridge"], k=60))
        for _ in range(8)
    ]
    (folder / "docs").mkdir()
    for i, text in enumerate(texts):
        (folder / "docs" / f"{i}.txt").write_text(text)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    train(texts, 300).save(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE)
    run(make_plan(Recipe.load(folder / "recipe.yaml"), Registry.from_environment(), Machine()))


@define
class Guard:
    """Notes what happens while `case` is set."""

    top: Path
    outside: Path
    case: Path | None = None
    seen: list[str] = field(factory=list)
    handle: int = -1

    def begin(self) -> None:
        libc = ctypes.CDLL(None)
        self.handle = libc.inotify_init1(os.O_NONBLOCK)
        for path in (self.outside, *self.outside.rglob("*")):  # opened, read, changed, made
            if not path.is_fifo():
                assert libc.inotify_add_watch(self.handle, bytes(path), 0x1 | 0x2 | 0x20 | 0x100 | 0x400) >= 0
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if self.case is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "ctypes.dlopen" and str(arguments[0]).startswith(str(self.top)):
            self.seen.append(f"{event} {arguments[0]}")
        elif event in ("exec", "compile"):
            name = arguments[0].co_filename if event == "exec" else arguments[1]
            name = os.fsdecode(name) if isinstance(name, str | bytes) else ""
            if name.startswith(str(self.top)):
                self.seen.append(f"{event} {name}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            self.opened(os.path.realpath(os.fsdecode(arguments[0])))

    def opened(self, path: str) -> None:
        repository = str(Path(__file__).parents[2])
        allowed = (str(self.case), *(f"{self.top}/{name}" for name in ("docs", "base", "recipe.yaml")))
        if not path.startswith((*allowed, *SYSTEM, sys.prefix, sys.base_prefix, repository)):
            self.seen.append(f"open {path}")

    def end(self) -> list[str]:
        """What happened in this case, and what Rust may have opened."""
        try:
            while events := os.read(self.handle, 1 << 16):
                while events:
                    _, mask, _, length = struct.unpack_from("iIII", events)
                    if not mask & 0x40000000:  # of the folder itself: it may be listed
                        self.seen.append(f"inotify {mask:x} {events[16 : 16 + length]!r}")
                    events = events[16 + length :]
        except BlockingIOError:
            pass
        seen, self.seen, self.case = self.seen, [], None
        return seen


@define(eq=False)
class Notes:
    """What a run says, and the steps that it takes."""

    notes: list[str] = field(factory=list)
    steps: list[int] = field(factory=list)

    @hookimpl
    def note(self, text: str) -> None:
        self.notes.append(text)

    @hookimpl
    def step_done(self, step: int) -> None:
        self.steps.append(step)


def generate(folder: Path) -> dict:
    llm = LLM(folder, machine=Machine())
    told = {"text": llm.generate("The river", SamplingParams(temperature=0, max_tokens=2))[0]["text"]}
    if llm.tokenizer.has_chat_template:
        told["chat"] = llm.tokenizer.chat([{"role": "user", "content": "hello"}], answer_next=True)
    return told


def go_on(folder: Path) -> dict:
    told = Notes()
    recipe = Recipe.load(folder.parents[1] / "recipe.yaml", sets=[f"output_dir={folder}"])
    run(make_plan(recipe, Registry.from_environment(), Machine()), callbacks=[told])
    return {"notes": told.notes, "steps": told.steps}


def late(number: int, frame: object) -> None:
    raise TimeoutError(f"nothing for {SECONDS} s")


def outcomes(folder: Path) -> dict[str, dict]:
    generate(folder / "base")  # imports what is imported late, which opens many files
    signal.signal(signal.SIGALRM, late)
    guard, found = Guard(folder, folder / "outside"), {}
    guard.begin()
    for kind, act in (("models", generate), ("runs", go_on)):
        for case in sorted((folder / kind).glob("*")):
            signal.alarm(SECONDS)
            guard.case = case
            try:
                told = act(case)
            except NanoError as e:
                told = {"error": type(e).__name__, "message": str(e)}
            except BaseException as e:
                told = {"error": "BUG", "message": f"{type(e).__name__}: {e}"}
            signal.alarm(0)
            found[case.name] = {**told, "seen": guard.end()}
    return found


if __name__ == "__main__":
    command, place = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(place)
    else:
        (place / "outcomes.json").write_text(json.dumps(outcomes(place), indent=1))
