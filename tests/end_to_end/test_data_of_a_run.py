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
    assert second.phases <= {"hashing the documents", "hashing the model"}
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
