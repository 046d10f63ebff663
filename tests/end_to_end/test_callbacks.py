"""Callbacks in whole runs: the bundled ones, and those that a tool hands over."""

import json
import os
import shutil

import pytest
from attrs import define, field

from nanovllm_core import Machine, Recipe, Registry, hookimpl, make_plan, run
from nanovllm_core.errors import BrokenComponent


@define(eq=False)
class Watch:
    perplexities: dict = field(factory=dict)

    @hookimpl
    def evaluated(self, step, metrics):
        self.perplexities[step] = f"{metrics['eval_perplexity']:,.2f}"


def go(folder, *sets):
    watch = Watch()
    plan = make_plan(Recipe.load(folder / "recipe.yaml", sets=sets), Registry.from_environment(), Machine())
    return run(plan, callbacks=[watch]), watch


def back_to(out, kept):
    """The folder as a kill after this checkpoint leaves it."""
    for path in out.glob("checkpoint-*"):
        if path.name > kept:
            shutil.rmtree(path)
    (out / "config.json").unlink()


def test_a_component_named_twice_works_twice(folder):
    """Each with its own options."""
    extractors = "data.extractors=[fields, {use: fields, fields: [words]}]"
    out, _ = go(folder, "callbacks=[metrics, {use: metrics, file: other.jsonl}]", extractors)
    assert (out / "other.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (out / "other.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]


def test_a_callback_with_a_misspelt_hook_is_refused_before_anything_is_written(folder):
    class Watcher:
        @hookimpl
        def step_don(self, step, metrics): ...

    plan = make_plan(Recipe.load(folder / "recipe.yaml"), Registry.from_environment(), Machine())
    with pytest.raises(BrokenComponent, match=r"callbacks\[0\] as given: Watcher .*did you mean 'step_done'"):
        run(plan, callbacks=[Watcher()])
    assert not (folder / "out").exists()


def test_lines_of_metrics_that_cannot_be_read_do_not_stop_a_resume(folder):
    out, _ = go(folder)
    back_to(out, "checkpoint-4")
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    broken = [b"\n", b'{"step": 2, "lo\n', b"\xff\x00\n", b"[]\n", b"3\n", b"{}\n", b'{"step": null}\n']
    path.write_bytes(b"".join([*lines[:2], *broken, *lines[2:], b'{"step": 3, "cut']))
    os.link(path, folder / "old.jsonl")
    before = path.read_bytes()
    go(folder)
    now = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert now == [json.loads(line)["step"] for line in lines]
    assert (folder / "old.jsonl").read_bytes() == before  # replaced, not written over: a kill on the way loses nothing


def test_perplexities_are_told_with_the_step_that_they_belong_to(folder, capsys):
    out, whole = go(folder, "callbacks=[metrics, progress]")
    told = [whole.perplexities[step] for step in (0, 3, 6)]
    assert f"held-out perplexity: {told[0]} before, {told[2]} after\n" in capsys.readouterr().out
    back_to(out, "checkpoint-2")
    go(folder, "callbacks=[metrics, progress]")
    assert f"held-out perplexity: {told[1]} at step 3, {told[2]} after\n" in capsys.readouterr().out
