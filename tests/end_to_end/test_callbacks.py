"""Callbacks in whole runs: the bundled ones, and those that a tool hands over."""

import json
import math
import os
import shutil

import pytest
from attrs import frozen

from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan
from nanovllm_core.callbacks.metrics import Metrics
from nanovllm_core.contracts import Decision
from nanovllm_core.errors import BrokenComponent


def back_to(out, kept):
    """The folder as a kill after this checkpoint leaves it."""
    for path in out.glob("checkpoint-*"):
        if path.name > kept:
            shutil.rmtree(path)
    (out / "config.json").unlink()


def test_a_component_named_twice_works_twice(go):
    """Each with its own options."""
    extractors = "data.extractors=[fields, {use: fields, fields: [words]}]"
    out, _ = go("callbacks=[metrics, {use: metrics, file: other.jsonl}]", extractors)
    assert (out / "other.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (out / "other.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_a_phase_is_over_once_and_only_when_its_work_is(go):
    from nanovllm_tokenizers.bpe import Bpe

    @frozen(kw_only=True, eq=False)
    class Slow:
        """Does most of its work after it has seen the last text."""

        @hookimpl
        def vocab_size(self, data_bytes):
            return Decision(400, "fixed")

        @hookimpl
        def make(self, texts, vocab_size):
            tokenizer = Bpe(size=vocab_size).make(texts, vocab_size, None)
            assert over == ["hashing the documents", "reading"]
            return tokenizer

    class Over:
        @hookimpl
        def phase_progress(self, phase, done, total):
            if done == total:
                over.append(phase)

    over = []
    go("tokenizer=slow", tokenizers={"slow": Slow}, callbacks=[Over()])
    assert over == ["hashing the documents", "reading", "building the vocabulary", "tokenising"]


def test_a_callback_with_a_misspelt_hook_is_refused_before_anything_is_written(go, folder):
    class Watcher:
        @hookimpl
        def step_don(self, step, metrics): ...

    with pytest.raises(BrokenComponent, match=r"callbacks\[1\] as given: Watcher .*did you mean 'step_done'"):
        go(callbacks=[Watcher()])
    assert not (folder / "out").exists()


def test_lines_of_metrics_that_cannot_be_read_do_not_stop_a_resume(go, folder):
    out, _ = go()
    back_to(out, "checkpoint-4")
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [b"\n", b'{"step": 2, "lo\n', b"\xff\x00\n", b"[]\n", b"3\n", b"{}\n", b'{"step": null}\n']
    path.write_bytes(b"".join([*lines[:2], *broken, *lines[2:], b'{"step": 3, "cut']))
    os.link(path, folder / "old.jsonl")
    before = path.read_bytes()
    go()
    now = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert now == [json.loads(line)["step"] for line in lines]
    assert (folder / "old.jsonl").read_bytes() == before  # replaced, not written over: a kill on the way loses nothing


def test_what_is_not_finite_is_null_in_what_metrics_writes(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    plan = make_plan(Recipe.load(folder / "recipe.yaml"), Registry.from_environment(), Machine())
    out = folder / "out"
    out.mkdir()
    for step in (1, 2, 1):  # and once more from the first on, as a resumed run does
        metrics = Metrics()
        metrics.run_started(plan)
        metrics.step_done(step, {"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})
        metrics.evaluated(step, {"eval_loss": 800.0, "eval_perplexity": math.inf, "eval_bits_per_byte": -math.inf})
        metrics.evaluated_by_source(step, [{"source": "a", "tokens": 3, "loss": math.nan, "perplexity": 1.5}])
        lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines[-2:] == [
            {"step": step, "loss": None, "gradient_norm": None, "learning_rate": 0.5},
            {"step": step, "eval_loss": 800.0, "eval_perplexity": None, "eval_bits_per_byte": None},
        ]
        assert len(lines) == 2 * step
        told = json.loads((out / "evaluation.json").read_text(), parse_constant=refuse)
        assert told == {"step": step, "sources": [{"source": "a", "tokens": 3, "loss": None, "perplexity": 1.5}]}
