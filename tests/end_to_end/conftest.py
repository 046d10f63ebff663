"""A small folder of documents and the recipe that trains on it in seconds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attrs import define, field, frozen
from safetensors.torch import load_file

from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan, run

RECIPE = """\
data: {{path: docs, max_seq_length: 64, chunk_overlap: 8, min_chunk_size: 8, eval_fraction: 0.2}}
tokenizer: {{use: bpe, size: 400}}
model: {{use: preset, size: tiny}}
train:
  max_steps: 6
  learning_rate: 2e-3
  warmup_steps: 1
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  eval_steps: 3
  save_steps: 2
  logging_steps: 1
generate: {{prompts: ["The river"], max_tokens: 8, temperature: 0}}
output_dir: {output}
"""


@define(eq=False)
class Watch:
    """Keeps everything that a run says."""

    notes: list = field(factory=list)
    steps: dict = field(factory=dict)
    evaluations: dict = field(factory=dict)
    saved: list = field(factory=list)
    answers: dict = field(factory=dict)
    phases: set = field(factory=set)

    @hookimpl
    def note(self, text):
        self.notes.append(text)

    @hookimpl
    def step_done(self, step, metrics):
        self.steps[step] = metrics

    @hookimpl
    def evaluated(self, step, metrics):
        self.evaluations[step] = metrics

    @hookimpl
    def checkpoint_saved(self, step, path):
        self.saved.append(step)

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        assert 0 <= done <= total
        self.phases.add(phase)

    @hookimpl
    def generated(self, prompt, text):
        self.answers[prompt] = text

    def said(self, part):
        return any(part in note for note in self.notes)


WORDS = "the river runs past old mills and under a stone bridge where children fish for trout".split()  # noqa: SIM905
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def folder(tmp_path):
    """A folder with documents of every format and `recipe.yaml`."""
    import random

    draw = random.Random(5)
    text = lambda n: " ".join(draw.choice(WORDS) for _ in range(n)) + "."  # noqa: E731
    docs = tmp_path / "docs"
    (docs / "deep" / "er").mkdir(parents=True)
    for i in range(4):
        (docs / "deep" / "er" / f"{i}.txt").write_text(text(60))
    (docs / "array.json").write_text(json.dumps([{"text": text(50)}, {"body": text(40)}]))
    (docs / "one.json").write_text(json.dumps({"content": text(70)}))
    records = [
        {"text": text(30)},
        {"content": text(30)},
        {"input": text(5), "output": text(20)},
        {"a": text(9), "b": text(9)},
    ]
    (docs / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (docs / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output="out"))
    return tmp_path


@pytest.fixture
def go(folder):
    """Runs the folder's recipe with `--set` texts, more callbacks and more components: the result's folder, what it said."""

    def go(*sets, callbacks=(), machine=None, stop=None, **kinds):
        watch = Watch()
        recipe = Recipe.load(folder / "recipe.yaml", sets=("callbacks=[metrics]", *sets))
        registry = Registry.from_environment().extended(**kinds)
        return run(make_plan(recipe, registry, machine or Machine()), callbacks=[watch, *callbacks], stop=stop), watch

    return go


@frozen
class Several:
    """The recipe of a folder on several ranks: real processes with gloo between them, started as a user starts them."""

    folder: Path

    ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
    TRAIN = ("train.global_batch_size=4", "train.per_device_train_batch_size=1", "train.rank_timeout=10")

    @property
    def first_on_path(self):
        """PYTHONPATH with the folder before what it holds."""
        return os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])

    def command(self, *sets, processes=2, extra=()):
        words = [word for s in (*self.TRAIN, *sets) for word in ("--set", s)]
        start = ["--nproc", str(processes)] if processes else []
        return [sys.executable, "-m", "nanovllm_core.cli", "run", "recipe.yaml", *start, *extra, *words]

    def start(self, *sets, environment=(), command=None, **options):
        return subprocess.Popen(
            command or self.command(*sets, **options), cwd=self.folder, env={**self.ENVIRONMENT, **dict(environment)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def nodes(self, *sets, port, words=None, **options):
        """torchrun on two nodes of one rank each, which meet at a port; `words`: of the launchers, for another rendezvous."""
        return [
            self.start(
                command=[sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                         *(words or ("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port))),
                         *self.command(*sets, processes=0)[1:]],
                **options,
            )
            for node in range(2)
        ]  # fmt: skip

    def plain(self, port, sets, **environment):
        """Ranks without a launcher, which would end the others of one that fails; each with its own keys."""
        world = {"WORLD_SIZE": str(len(sets)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        return [
            self.start(
                *mine, processes=0, environment={**environment, **world, "RANK": str(rank), "MASTER_PORT": str(port)}
            )
            for rank, mine in enumerate(sets)
        ]

    def run(self, *sets, **options):
        done = subprocess.run(
            self.command(*sets, **options), cwd=self.folder, env=self.ENVIRONMENT, capture_output=True, text=True,
            timeout=240, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def losses(self, out="out"):
        lines = [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]
        return {x["step"]: x["loss"] for x in lines if "loss" in x}

    def same(self, a, b):
        held, wanted = (load_file(self.folder / out / "model.safetensors") for out in (a, b))
        return held.keys() == wanted.keys() and all(held[k].equal(wanted[k]) for k in wanted)

    def ranks(self):
        """Processes of the run, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                told = dict(p.partition("=")[::2] for p in (path / "environ").read_text().split("\0"))
                if (path / "cwd").resolve() == self.folder.resolve() and "RANK" in told:
                    found[int(told["RANK"])] = int(path.name)
            except (OSError, UnicodeDecodeError):
                continue
        return found

    def begun(self, ranks=0, path="out"):
        """Wait until the output folder (or a file) is there; with `ranks`, until so many processes are."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(self.ranks()) >= ranks if ranks else (self.folder / path).exists():
                return
            time.sleep(0.02)
        raise AssertionError(f"not there in time: {f'{ranks} ranks' if ranks else path}")

    def under_way(self, process, steps):
        """Wait for so many steps."""
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (self.folder / "out" / "metrics.jsonl").exists() and max(self.losses(), default=0) >= steps:
                return
            time.sleep(0.05)
        raise AssertionError(process.communicate())


@pytest.fixture
def several(folder):
    """`folder`, to be run on several ranks."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs Linux: fork and /proc")
    return Several(folder)


@pytest.fixture
def port():
    """A port that nobody listens on."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The folder of a small model from random weights, which has a chat template and answers with text that wanders."""
    from nanovllm_core.assemble import assemble, models_of, tokenizer_of
    from nanovllm_core.plan_model import plan_model
    from nanovllm_core.training.export import export

    folder = tmp_path_factory.mktemp("small") / "model"
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": 300}}
    plan = plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())
    tokenizer = tokenizer_of(plan, lambda: [" ".join(WORDS)])
    module = assemble(plan, "cpu", seed=1, training=False).module
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    export(folder, module.named_parameters(), models_of(plan).config(shape=plan.shape), tokenizer, "float32")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder
