"""A small folder of documents and the recipe that trains on it in seconds."""

import json

import pytest
from attrs import define, field

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
