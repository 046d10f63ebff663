"""What a run does with its documents: the vocabulary and the tokens made once, skipped records listed, copies told."""

import json
import shutil

import pytest

from nanovllm_core.errors import DataError


def test_a_second_run_makes_neither_vocabulary_nor_tokens_again(go, folder):
    _, first = go("train.max_steps=2")
    assert {"reading", "building the vocabulary", "tokenising"} <= first.phases
    kept = {p.name: p.read_bytes() for p in (folder / "out" / "tokens").rglob("*") if p.is_file()}
    _, second = go("train.max_steps=4")
    assert second.phases <= {"hashing the documents", "hashing the model", "evaluating"}
    assert kept == {p.name: p.read_bytes() for p in (folder / "out" / "tokens").rglob("*") if p.is_file()}


def test_a_damaged_vocabulary_is_made_again_and_the_run_goes_on(go, folder):
    go("train.max_steps=2")
    [file] = (folder / "out" / "tokens").glob("tokenizer-*/tokenizer.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    _, again = go("train.max_steps=4")
    assert "building the vocabulary" in again.phases
    assert again.said("going on from checkpoint-2")
    assert file.read_bytes() == whole


def test_another_seed_holds_out_others_and_makes_another_vocabulary(go, folder):
    go("train.max_steps=1")
    [one] = (folder / "out" / "tokens").glob("tokenizer-*")
    _, watch = go("train.max_steps=1", "train.seed=7")
    [two] = (folder / "out" / "tokens").glob("tokenizer-*")
    assert one.name != two.name
    assert "building the vocabulary" in watch.phases


def test_copies_are_told_and_what_is_skipped_is_listed(go, folder):
    shutil.copy(folder / "docs" / "deep" / "er" / "0.txt", folder / "docs" / "copy.txt")
    with (folder / "docs" / "lines.jsonl").open("a") as file:
        file.write('{"text": NaN}\n{"text": " "}\n')
    with pytest.raises(DataError, match=r"^lines\.jsonl:5:\d+: NaN is not JSON$"):
        go("train.max_steps=1")
    out, watch = go("train.max_steps=1", "data.on_error=skip")
    assert watch.said("1 skipped (broken record), 1 skipped (empty)")
    assert watch.said("1 documents are exact copies of others")
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(one["source"], one["line"], one["kind"]) for one in listed] == [
        ("lines.jsonl", 5, "broken record"),
        ("lines.jsonl", 6, "empty"),
    ]
    with pytest.raises(DataError, match=r"lines\.jsonl:5"):  # the same documents, but no longer allowed
        go("train.max_steps=1")


def test_an_evaluation_may_be_kept_short(go):
    _, whole = go("data.eval_fraction=0.6")
    _, short = go("data.eval_fraction=0.6", "data.eval_max_tokens=20", "output_dir=short")
    assert short.evaluations.keys() == whole.evaluations.keys()
    assert short.evaluations[0]["eval_loss"] != whole.evaluations[0]["eval_loss"]
    assert [m["loss"] for m in short.steps.values()] == [m["loss"] for m in whole.steps.values()]


def test_what_is_lost_with_the_rest_of_a_file_is_told_in_bytes(go, folder):
    text = '["the river runs", "past old mills" "and under a bridge", "where children fish"]'
    (folder / "docs" / "rest.json").write_text(text)
    size = sum(p.stat().st_size for p in (folder / "docs").rglob("*.*") if p.suffix != ".png")
    lost = len(text) - text.index(' "and') - 1
    share = lost / size
    told = f"1 skipped (unreadable file, or the rest of it); left out with unreadable files: {lost} of {size:,} bytes"
    for allowed in (1, share + 1e-6):
        out, watch = go("train.max_steps=1", "data.on_error=skip", f"data.max_errors={allowed}")
        assert watch.said(told)
        [line] = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
        assert (line["source"], line["byte"], line["bytes_lost"]) == ("rest.json", len(text) - lost, lost)
    with pytest.raises(DataError, match=rf"{lost} of {size:,} bytes cannot be read"):  # though the tokens are there
        go("train.max_steps=1", "data.on_error=skip", f"data.max_errors={share - 1e-6}")
