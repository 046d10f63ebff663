"""Whose an output folder is, and when its run is finished: interruptions at every joint, and runs that differ."""

import json
import shutil

import pytest
import torch
from attrs import define, frozen
from safetensors.torch import load_file, save_file

from nanovllm_core import hookimpl
from nanovllm_core.contracts import Accept, Decision, Record, Refuse
from nanovllm_core.errors import CheckpointError, DataError, OutputError, RecipeError


class Stop(Exception):
    """What an interruption looks like from inside."""


@define(eq=False)
class StopAt:
    """Ends the run at an event."""

    step: int = 0
    prompt: str = ""

    @hookimpl
    def checkpoint_saved(self, step):
        if step == self.step:
            raise Stop

    @hookimpl
    def generated(self, prompt):
        if prompt == self.prompt:
            raise Stop


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_extended_run_that_stops_before_its_export_is_not_finished(go):
    out, _ = go()
    short = weights(out)
    with pytest.raises(Stop):
        go("train.max_steps=9", callbacks=[StopAt(step=9)])
    assert same(weights(out), short)
    _, watch = go("train.max_steps=9")
    assert watch.said("going on from checkpoint-9")
    assert watch.steps == {}
    assert same(weights(out), load_file(out / "checkpoint-9" / "model.safetensors"))
    assert not same(weights(out), short)
    _, watch = go("train.max_steps=9")
    assert watch.said("this run is finished (9 steps)")


def test_prompts_are_answered_after_a_stop_between_export_and_answer(go):
    with pytest.raises(Stop):
        go(callbacks=[StopAt(prompt="The river")])
    _, watch = go()
    assert watch.answers["The river"]
    _, watch = go()
    assert watch.said("this run is finished")


def test_an_older_export_in_more_files_leaves_nothing_behind(go):
    out, _ = go()
    single = weights(out)
    half = len(single) // 2
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, keys in zip(names, (list(single)[:half], list(single)[half:]), strict=True):
        save_file({key: single[key] for key in keys}, out / name)
    (out / "model.safetensors").rename(out / "model.safetensors.index.json")
    go("train.max_steps=9")
    assert {p.name for p in out.glob("model*")} == {"model.safetensors"}


def test_the_same_recipe_in_other_words_is_the_same_run(go, folder):
    go()
    _, watch = go("data.readers=[jsonl, txt, json]", "data.extractors=nanovllm/fields", f"data.path={folder / 'docs'}")
    assert watch.said("this run is finished")


def test_another_reading_of_the_same_files_is_another_run(go, folder):
    (folder / "docs" / "accent.txt").write_text("the café by the river " * 30, encoding="utf-8")
    out, _ = go()
    first = {p.name for p in (out / "tokens").iterdir()}
    _, watch = go("data.readers=[{use: txt, encoding: latin-1}, json, jsonl]")
    assert watch.said("previous/1")
    assert {"reading", "tokenising"} <= watch.phases
    second = {p.name for p in (out / "tokens").iterdir()}
    assert len(first) == len(second) == 2  # tokens and the vocabulary, the old ones removed
    assert not first & second


def test_a_second_run_does_not_read_the_documents_again(go):
    out, _ = go()
    shutil.rmtree(out / "checkpoint-6")
    _, watch = go()
    assert watch.said("going on from checkpoint-4")
    assert not {"reading", "tokenising"} & watch.phases
    assert watch.said("11 documents in 7 files")


def test_figures_before_training_are_kept_over_a_resume(go):
    _, whole = go()
    before = whole.evaluations[0]["eval_perplexity"]
    with pytest.raises(Stop):
        go("output_dir=b", callbacks=[StopAt(step=4)])
    _, rest = go("output_dir=b")
    assert rest.said(f"held-out perplexity: {before:,.2f} before, {rest.evaluations[6]['eval_perplexity']:,.2f} after")


def test_a_base_model_with_other_weights_is_another_run(go, folder):
    out, _ = go()
    base = folder / "base"
    base.mkdir()
    for path in out.iterdir():
        if path.is_file():
            shutil.copy(path, base)
    tune = ("model={use: pretrained, path: base}", "tokenizer=auto", "output_dir=tuned")
    go(*tune)
    base.rename(folder / "renamed")
    _, watch = go("model={use: pretrained, path: renamed}", *tune[1:])
    assert watch.said("this run is finished")
    changed = {name: tensor + 0.01 for name, tensor in weights(folder / "renamed").items()}
    save_file(changed, folder / "renamed" / "model.safetensors", {"format": "pt"})
    _, watch = go("model={use: pretrained, path: renamed}", *tune[1:])
    assert watch.said("previous/1")


def test_a_model_in_the_output_folder_is_refused_before_it_would_move(go):
    out, _ = go()
    with pytest.raises(RecipeError, match=r"model\.path: .*checkpoint-6 lies in output_dir"):
        go("model={use: pretrained, path: out/checkpoint-6}", "tokenizer=auto")
    assert (out / "checkpoint-6").exists()
    go("train.seed=3")
    go("model={use: pretrained, path: out/previous/1}", "tokenizer=auto")
    assert (out / "previous" / "2").exists()


def test_what_a_callback_makes_in_the_folder_belongs_to_the_run(go):
    class Board:
        @hookimpl
        def run_started(self, plan):
            (plan.output_dir / "board").mkdir(exist_ok=True)

    out, _ = go(callbacks=[Board()])
    assert (out / "board").is_dir()
    _, watch = go(callbacks=[Board()])
    assert watch.said("this run is finished")


def test_a_lost_lock_is_made_good_by_the_checkpoints(go):
    out, _ = go()
    (out / "plan.lock.json").write_text("")
    _, watch = go()
    assert watch.said("this run is finished")
    assert json.loads((out / "plan.lock.json").read_text())["identity"]


def test_a_move_that_was_cut_short_is_finished(go):
    out, _ = go()
    old = weights(out)
    moving = out / "previous" / "1.moving"
    moving.mkdir(parents=True)
    for name in ("plan.lock.json", "checkpoint-4", "tokenizer.json"):
        (out / name).rename(moving / name)
    _, watch = go()
    assert watch.said("previous/1")
    assert sorted(watch.steps) == [1, 2, 3, 4, 5, 6]
    assert same(weights(out / "previous" / "1"), old)
    assert (out / "previous" / "1" / "checkpoint-4").is_dir()
    assert not moving.exists()


def test_secrets_stay_out_of_the_output_folder(go):
    @frozen(kw_only=True, eq=False)
    class Vault:
        """Documents behind a key."""

        api_key: str
        rows: int = 30

        @hookimpl
        def probe(self, source):
            return Accept() if source.path == "vault:" else Refuse("not mine")

        @hookimpl
        def read(self, source):
            return iter([Record(value=f"document {i} of the mill", source="vault", index=i) for i in range(self.rows)])

    out, _ = go("data.path='vault:'", "data.readers={use: vault, api_key: hush-4711}", readers={"vault": Vault})
    lock = json.loads((out / "plan.lock.json").read_text())
    assert lock["components"]["data.readers"][0]["options"] == {"api_key": "***", "rows": 30}
    assert [c["use"] for c in lock["components"]["callbacks"]] == ["nanovllm/metrics"]
    assert not [p for p in out.rglob("*") if p.is_file() and b"hush-4711" in p.read_bytes()]


def test_a_tokenizer_that_now_makes_another_vocabulary_is_refused(go):
    from nanovllm_tokenizers.bpe import Bpe

    taught = []

    @frozen(kw_only=True, eq=False)
    class Learned:
        """A vocabulary from more than the documents."""

        @hookimpl
        def vocab_size(self, data_bytes):
            return Decision(400, "fixed")

        @hookimpl
        def make(self, texts, vocab_size):
            return Bpe(size=vocab_size).make(lambda: [*texts(), *taught], vocab_size, None)

    with pytest.raises(Stop):
        go("tokenizer=learned", tokenizers={"learned": Learned}, callbacks=[StopAt(step=4)])
    taught.append("zebra zebra quagga quagga " * 500)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        go("tokenizer=learned", tokenizers={"learned": Learned})


def test_a_finished_run_stays_as_it_is_without_its_checkpoints_and_with_other_prompts(go):
    out, _ = go()
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    lock, model = (out / "plan.lock.json").read_bytes(), (out / "model.safetensors").stat().st_mtime_ns
    _, watch = go("generate.prompts=[Other]")
    assert watch.said("this run is finished (6 steps)")
    assert (out / "plan.lock.json").read_bytes() == lock
    assert (out / "model.safetensors").stat().st_mtime_ns == model


def test_a_bad_document_moves_nothing(go, folder):
    out, _ = go()
    before = weights(out)
    (folder / "docs" / "bad.jsonl").write_text('{"text": }\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1:"):
        go()
    assert same(weights(out), before)
    assert not (out / "previous").exists()


def test_fewer_steps_than_a_checkpoint_has_are_said_and_measured(go):
    with pytest.raises(Stop):
        go(callbacks=[StopAt(step=4)])
    out, watch = go("train.max_steps=3")
    assert watch.said("asks for 3 steps and 4 are done")
    assert not watch.said("laid out anew")
    assert watch.said(f"{watch.evaluations[4]['eval_perplexity']:,.2f} after")
    assert same(weights(out), load_file(out / "checkpoint-4" / "model.safetensors"))


@pytest.mark.parametrize("name", ["tokens", "previous", "notes.partial"])
def test_a_folder_that_no_run_made_is_left_alone_whatever_it_holds(go, folder, name):
    mine = folder / "mine" / name / "raw"
    mine.mkdir(parents=True)
    (mine / "a.txt").write_text("precious")
    with pytest.raises(OutputError, match="so no run made it"):
        go("output_dir=mine")
    with pytest.raises(RecipeError, match=r"--set data\.path=.*: data\.path: .* lies in output_dir"):
        go("output_dir=mine", f"data.path=mine/{name}/raw")
    assert (mine / "a.txt").read_text() == "precious"


def test_what_others_put_beside_the_token_stores_stays(go):
    out, _ = go()
    (out / "tokens" / "mine").mkdir()
    (out / "tokens" / "mine" / "meta.json").write_text("{}")
    (out / "tokens" / "mine" / "a.txt").write_text("precious")
    go("data.path=docs/deep", "train.seed=3")
    assert (out / "tokens" / "mine" / "a.txt").read_text() == "precious"


def test_a_first_run_stopped_before_it_has_an_identity_is_begun_anew(go):
    class Early:
        @hookimpl
        def run_started(self, plan):
            (plan.output_dir / "my.log").write_text("begun")

        @hookimpl
        def phase_progress(self, phase):
            raise Stop

    with pytest.raises(Stop):
        go(callbacks=[Early()])
    out, watch = go()
    assert watch.said("previous/1")
    assert (out / "previous" / "1" / "my.log").exists()
    assert (out / "model.safetensors").exists()


def test_a_broken_reader_is_told_where_auto_goes_without_it(go, folder):
    @frozen(kw_only=True, eq=False)
    class Sure:
        """Answers with the wrong type."""

        @hookimpl
        def probe(self, source):
            return source.name.endswith(".md")

        @hookimpl
        def read(self, source):
            return iter([])

    class Misspelt:
        @hookimpl
        def prob(self, source):
            return Accept()

    (folder / "docs" / "a.md").write_text("left out")
    _, watch = go(readers={"sure": Sure, "misspelt": Misspelt})
    assert watch.said("reader sure: its probe answered")
    assert watch.said("reader misspelt: ")
    assert watch.said("1 files of kind .md are left out")


def test_what_a_kill_leaves_at_the_very_beginning_is_begun_anew(go, folder):
    """Killed while the folder was made its own, and while tokens were stored: neither stops the next run, nor stays."""
    (folder / "out").mkdir()
    (folder / "out" / ".plan.lock.json.partial").write_text('{"iden')
    building = folder / "out" / "tokens" / ".building-0123456789ab-abcdefgh"
    with pytest.raises(Stop):
        go(callbacks=[StopAt(step=2)])
    building.mkdir()
    (building / "tokens.bin").write_bytes(b"\0" * 100)
    out, watch = go()
    assert sorted(watch.steps)[-1] == 6
    assert not list(out.rglob(".*.partial"))
    assert not building.exists()
