"""The command line as a user meets it: real processes."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest


def nanovllm(*arguments, cwd=None):
    command = [sys.executable, "-m", "nanovllm_core.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_init_run_generate(tmp_path):
    done = nanovllm("init", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    topics = import_module("pydoc_data.topics").topics
    count, characters = len(topics), sum(map(len, topics.values()))
    assert done.stdout == (
        f"{count} documents ({characters:,} characters) in demo/documents, and the recipe demo/recipe.yaml\n"
        "next: nanovllm run demo/recipe.yaml\n"
    )
    kinds = {p.suffix for p in (tmp_path / "demo" / "documents").rglob("*") if p.is_file()}
    assert kinds == {".txt", ".json", ".jsonl"}
    short = ["train.max_steps=4", "train.eval_steps=2", "data.path=documents/notes", "generate.max_tokens=6"]
    done = nanovllm("run", "demo/recipe.yaml", *(x for s in short for x in ("--set", s)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "parameters",
        "vocabulary",
        "tokenising",
        "step 4/4",
        "bits per byte",
        "continues:",
        "the model is in",
    ):
        assert part in done.stdout
    assert "\x1b" not in done.stdout
    done = nanovllm(
        "generate", "demo/model", "--prompt", "The", "--max-tokens", "5", "--temperature", "0", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["prompt"] == "The"
    assert len(answer["token_ids"]) <= 5
    again = nanovllm("init", "demo", cwd=tmp_path)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr


def test_explain_prints_every_choice(folder):
    sets = ("--set", "train.seed=9", "--set", "tokenizer={use: bpe, size: 500}")
    done = nanovllm("explain", folder / "recipe.yaml", *sets)
    assert done.returncode == 0, done.stderr
    assert "parameters, 4 layers, hidden 256" in done.stdout
    assert "kernels       torch from nanovllm" in done.stdout
    assert "for embedding, linear, rms_norm" in done.stdout
    assert "jsonl from nanovllm" in done.stdout
    assert ": 4 files" in done.stdout  # the txt reader's
    assert "seed: 9 (--set train.seed=9)" in done.stdout
    assert "size: 500 (--set tokenizer={use: bpe, size: 500})" in done.stdout
    assert 'size: "tiny" (' in done.stdout
    assert "recipe.yaml:3:" in done.stdout
    assert "(default)" in done.stdout
    assert ".png are left out" in done.stdout
    assert not (folder / "out").exists()


def test_plugins(tmp_path):
    rows = json.loads(nanovllm("plugins", "--json", cwd=tmp_path).stdout)
    assert all(row.keys() == {"kind", "name", "distribution", "version", "state", "summary"} for row in rows)
    assert {"readers", "extractors", "tokenizers", "models", "kernels", "parallel", "callbacks"} == {
        r["kind"] for r in rows
    }
    table = nanovllm("plugins").stdout
    assert "tokenizers  bpe" in table
    shown = nanovllm("plugins", "models:preset").stdout
    assert "tiny" in shown
    assert "size:" in shown
    assert nanovllm("plugins", "models:prset").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nothere.yaml"], "nothere.yaml: no such file"),
        (["run", "recipe.yaml", "--set", "train.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["run", "recipe.yaml", "--set", "model.use=prset"], "did you mean 'preset'"),
        (
            ["run", "recipe.yaml", "--set", "model.size=huge"],
            "--set model.size=huge: model.size: got 'huge' (allowed: 'tiny', 'small', ",
        ),
        (["run", "recipe.yaml", "--set", "model.sise=tiny"], "did you mean 'size'"),
        (
            ["run", "recipe.yaml", "--without", "kernels:torch"],
            "kernels.embedding: no component accepts:\n  flash_attn: ",
        ),
        (["run", "recipe.yaml", "--set", "tokenizer={use: hf, path: ./nowhere}"], "./nowhere: no such folder"),
        (["generate", "docs", "--prompt", "x"], "docs: no config.json"),
        (["generate", "nowhere/at/all", "--prompt", "x"], "nowhere/at/all: no such folder"),
        (["explain", "docs"], "docs: is a folder; name the recipe file in it"),
        (["init", "docs/one.json/demo"], "docs/one.json/demo: cannot be written (Not a directory)"),
        (["init", "docs/" + "x" * 300], "cannot be written (File name too long)"),
        (["generate", "docs", "--prompt", "x", "--model", "pretraind"], "did you mean 'pretrained'"),
        (["generate", "docs", "--prompt", "x", "--model", "{use: preset, size: tiny}"], "unknown key 'path'"),
        (["generate", "docs", "--prompt", "x", "--model", "{"], "--model:1:"),
        (["generate", "docs", "--prompt", "x", "--top-k", "0"], "--top-k: got 0, allowed: 1 and more"),
        (
            ["generate", "docs", "--prompt", "x", "--kv-cache-tokens", "0"],
            "--kv-cache-tokens: got 0, allowed: 1 and more",
        ),
        (["chat", "docs", "--tensor-parallel-size", "0"], "--tensor-parallel-size: got 0, allowed: 1 and more"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(folder, arguments, says):
    done = nanovllm(*arguments, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("nanovllm: ")


def test_help_teaches():
    for arguments in (["--help"], []):
        text = nanovllm(*arguments).stdout
        assert "start here" in text
        assert "nanovllm init demo" in text
    text = nanovllm("run", "--help").stdout
    assert "gradient_accumulation_steps: forward passes to one optimizer step" in text
    assert "--set train.learning_rate=1e-4" in text


def test_version():
    from importlib.metadata import version

    assert nanovllm("--version").stdout.strip() == f"nanovllm {version('nanovllm')}"


@pytest.mark.skipif(sys.platform == "win32", reason="needs head")
@pytest.mark.parametrize("arguments", [["schema"], ["plugins", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize("wanted", [10, 0])
def test_a_reader_that_goes_away_is_no_error(arguments, wanted):
    for _ in range(4):
        command = [sys.executable, "-m", "nanovllm_core.cli", *arguments]
        ours = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        head = subprocess.Popen(["head", "-c", str(wanted)], stdin=ours.stdout, stdout=subprocess.PIPE)
        ours.stdout.close()
        assert len(head.communicate()[0]) == wanted
        assert ours.stderr.read() == b""
        ours.stderr.close()
        assert ours.wait() in (0, 1)  # what is short may be written before `head` ends


@pytest.mark.parametrize("arguments", [["schema"], ["--version"], ["run", "no such.yaml"]])
def test_nor_is_one_that_has_gone(arguments):
    """Output and errors go where nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "nanovllm_core.cli", *arguments], stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_takes_no_more_is_one_line(small_model):
    with open("/dev/full", "w") as full:
        words = ["generate", str(small_model), "--prompt", "x", "--max-tokens", "3"]
        done = subprocess.run(
            [sys.executable, "-m", "nanovllm_core.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (2, "nanovllm: the output cannot be written: No space left on device\n")


def test_a_cache_that_shortens_answers_says_so(small_model):
    done = nanovllm("generate", small_model, "--prompt", "the river", "--ignore-eos", "--kv-cache-tokens", "32")
    assert done.returncode == 0
    assert "the cache holds 32 tokens, so prompt and answer together have no more; the model takes" in done.stderr


def test_an_answer_is_printed_while_it_is_made(small_model):
    """Into a pipe too; a signal in the middle leaves what there is."""
    command = [sys.executable, "-m", "nanovllm_core.cli", "generate", str(small_model), "--prompt", "the river"]
    options = ["--seed", "1", "--ignore-eos", "--max-tokens"]
    whole = nanovllm(*command[3:], *options, "60").stdout
    with subprocess.Popen(
        [*command, *options, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        found = process.stdout.read(40)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert whole.startswith(found)
    assert whole.endswith("\n\n")
    assert not rest.endswith("\n\n")
    assert process.returncode == 130
    assert said == "nanovllm: interrupted\n"
