"""`nanovllm generate --file --out`: real processes, killed and stopped at random moments, and the same command again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nanovllm_core import LLM, Machine, SamplingParams
from nanovllm_core.cli import main
from nanovllm_core.generation.answers import line_of
from nanovllm_core.generation.questions import seed_of

WAIT = 120  # seconds until a test gives up


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def questions(count, seed=0):
    draw = random.Random(seed)
    return [{"prompt": f"the river {draw.random()}", "max_tokens": draw.randint(2, 20)} for _ in range(count)]


@pytest.fixture
def place(tmp_path, monkeypatch, small_model):
    """An empty folder, with `model` in it."""
    (tmp_path / "model").symlink_to(small_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def go(place, capsys):
    """The command in this process: its exit code, what it printed and what it said."""

    def go(*words, file="in.jsonl", out="out.jsonl"):
        named = ["--out", out] if out else []
        code = main(["generate", "model", "--file", file, *named, *map(str, words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return go


def start(place, *words, count=3):
    """No draw with this seed comes nearer to the next token than 4e-6, a hundred times what the company changes."""
    command = [
        sys.executable,
        "-m",
        "nanovllm_core.cli",
        "generate",
        "model",
        "--file",
        "in.jsonl",
        "--out",
        "out.jsonl",
    ]
    return subprocess.Popen(
        [*command, "--seed", "10", "--top-p", "1", "--batch-size", str(count), *words], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def written(place, count, process):
    """Wait until so many answers are there, or the process is over."""
    deadline = time.monotonic() + WAIT
    path = place / "out.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


def test_each_line_is_answered_as_it_asks(place, go):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "mills?"}]
    asked = [
        {"prompt": "the river", "id": "a"},
        {"prompt": "ein Fluß\u2028", "id": 7, "temperature": 0, "max_tokens": 5},
        {"token_ids": [9, 8, 7], "top_k": 3, "seed": 11},
        {"messages": chat, "min_p": 0.1, "repetition_penalty": 1.2},
        {"prompt": "", "stop": ["q", "zz"], "stop_token_ids": [90], "ignore_eos": True},
        {"prompt": "old mills", "n": 3, "logprobs": 2, "top_p": 0.5, "max_tokens": 4},
    ]
    write(place / "in.jsonl", asked)
    code, printed, _ = go("--seed", 3, "--max-tokens", 9)
    assert (code, printed) == (0, "out.jsonl: all 6 prompts are answered\n")
    llm = LLM(place / "model", machine=Machine())
    base = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 9}
    wanted = []
    for i, line in enumerate(asked):
        own = {k: v for k, v in line.items() if k not in ("prompt", "id", "token_ids", "messages")}
        params = SamplingParams(**{**base, "seed": seed_of(3, i), **own})
        ask = llm.chat if "messages" in line else llm.generate
        outputs = ask(line.get("messages", line.get("token_ids", line.get("prompt"))), params)
        told = {"index": i, **{k: line[k] for k in ("id", "prompt", "messages") if k in line}}
        if "token_ids" in line:
            told["prompt_token_ids"] = line["token_ids"]
        wanted.append(json.loads(line_of(told, outputs)))
    found = lines_of(place / "out.jsonl")
    logprobs = [[a.pop("logprobs") for a in lines[5]["answers"]] for lines in (wanted, found)]
    assert found == wanted
    values = [[t["logprob"] for answer in answers for t in answer] for answers in logprobs]
    assert values[0] == pytest.approx(values[1], rel=1e-4)  # their last digits are the company's
    wanted = (place / "out.jsonl").read_bytes()
    assert len((place / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 6  # U+2028 is escaped
    assert len(lines_of(place / "out.jsonl")[5]["answers"]) == 3
    assert sorted(p.name for p in place.iterdir()) == ["in.jsonl", "model", "out.jsonl", "out.jsonl.run.json"]
    code, printed, _ = go("--seed", 3, "--max-tokens", 9)
    assert (code, printed) == (0, "out.jsonl: finished, all 6 prompts are answered\n")
    assert (place / "out.jsonl").read_bytes() == wanted


def test_text_files_and_printed_answers(place, go):
    (place / "in.txt").write_bytes("\ufeffthe river\r\n\n  old mills \nÄ".encode())
    write(place / "in.jsonl", [{"prompt": p} for p in ("the river", "  old mills ", "Ä")])
    code, printed, _ = go("--seed", 1, file="in.txt", out=None)
    assert code == 0
    found = [json.loads(line) for line in printed.splitlines()]
    assert go("--seed", 1)[0] == 0
    assert sorted(found, key=lambda line: line["index"]) == lines_of(place / "out.jsonl")
    words = ["generate", "model", "--seed", "1", "--out", "by_flags.jsonl"]
    assert main([*words, *(w for p in ("the river", "  old mills ", "Ä") for w in ("--prompt", p))]) == 0
    assert (place / "by_flags.jsonl").read_bytes() == (place / "out.jsonl").read_bytes()


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(place):
    """In every form that a kill or a power cut leaves: whole lines, a torn one, none at all."""
    draw = random.Random(20)
    write(place / "in.jsonl", questions(120))
    done = start(place, count=7)
    assert done.wait(WAIT) == 0, done.communicate()
    wanted = (place / "out.jsonl").read_bytes()
    assert [line["index"] for line in lines_of(place / "out.jsonl")] == list(range(120))
    for path in place.glob("out.jsonl*"):
        path.unlink()
    kills = 0
    for _ in range(6):
        before = (place / "out.jsonl").read_bytes() if (place / "out.jsonl").exists() else b""
        process = start(place, count=draw.choice([1, 2, 5, 9]))
        written(place, before.count(b"\n") + draw.randint(0, 25), process)
        time.sleep(draw.random() / 20)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (place / "out.jsonl").exists():
            now = (place / "out.jsonl").read_bytes()
            assert now.startswith(before[: before.rfind(b"\n") + 1])
            if draw.random() < 0.5 and now:
                (place / "out.jsonl").write_bytes(now[: draw.randint(now.rstrip(b"\n").rfind(b"\n") + 1, len(now))])
    assert kills >= 4
    process = start(place)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err
    assert out.endswith("all 120 prompts are answered\n")
    assert (place / "out.jsonl").read_bytes() == wanted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_word(place, number):
    write(place / "in.jsonl", questions(400))
    process = start(place)
    written(place, 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 128 + number, err
    done = (place / "out.jsonl").read_bytes()
    assert done.endswith(b"\n")
    assert f"stopped with {done.count(bytes([10]))} of 400 answers in out.jsonl; the same command goes on" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("keep", ["", '{"index": 0, "te', "whole"])
def test_a_torn_last_line_is_cut_and_a_whole_one_kept(place, go, keep):
    write(place / "in.jsonl", questions(5))
    assert go("--seed", 1)[0] == 0
    wanted = (place / "out.jsonl").read_bytes()
    first, second, *_ = wanted.split(b"\n")
    (place / "out.jsonl").write_bytes(second + b"\n" + (first if keep == "whole" else keep.encode()))
    code, _, err = go("--seed", 1)
    assert code == 0
    assert (f"cut {len(keep)} bytes" in err) == (keep.startswith("{"))
    assert f"going on behind {2 if keep == 'whole' else 1} of 5 answers" in err
    assert (place / "out.jsonl").read_bytes() == wanted


def test_what_has_changed_is_refused(place, go):
    write(place / "in.jsonl", questions(4))
    assert go("--seed", 1)[0] == 0
    wanted = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").write_bytes(b"".join(wanted.splitlines(keepends=True)[:2]))
    held = (place / "out.jsonl").read_bytes()

    def refused(*words, says):
        code, _, err = go(*words)
        assert code == 2
        assert says in err
        assert "take out.jsonl and out.jsonl.run.json away" in err
        assert (place / "out.jsonl").read_bytes() == held

    refused("--seed", 2, says="sampling.seed: 1 then, 2 now")
    refused("--seed", 1, "--n", 2, says="sampling.n: 1 then, 2 now")
    refused("--seed", 1, "--max-model-len", 100, says="max_model_len: 4096 then, 100 now")
    refused("--seed", 1, "--dtype", "bfloat16", says='dtype: "float32" then, "bfloat16" now')
    write(place / "in.jsonl", questions(5))
    refused("--seed", 1, says="input.prompts: 4 then, 5 now")
    write(place / "in.jsonl", questions(4))
    other = shutil.copytree(place / "model", place / "other")
    (place / "model").unlink()
    other.rename(place / "model")
    config = json.loads((place / "model" / "tokenizer_config.json").read_text())
    (place / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "other"}))
    refused("--seed", 1, says="model.sha256: ")
    (place / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.rmtree(place / "model")
    (place / "model").mkdir()
    refused("--seed", 1, says="model.sha256: ")


def test_a_file_that_no_run_made_is_left_alone(place, go):
    write(place / "in.jsonl", questions(3))
    (place / "out.jsonl").write_text("mine\n")
    code, _, err = go()
    assert code == 2
    assert "out.jsonl: holds something and there is no out.jsonl.run.json beside it" in err
    assert (place / "out.jsonl").read_text() == "mine\n"
    (place / "out.jsonl").unlink()
    assert go("--seed", 1)[0] == 0
    lines = (place / "out.jsonl").read_text().splitlines(keepends=True)
    for bad, says in (
        ("mine\n", "out.jsonl:2: is no answer that a run wrote"),
        ('{"index": 3}\n', "out.jsonl:2: index: got 3, allowed: 0 to 2"),
        (lines[0], "out.jsonl:2: index 0: has an answer already"),
    ):
        (place / "out.jsonl").write_text(lines[0] + bad + lines[2])
        code, _, err = go("--seed", 1)
        assert code == 2
        assert says in err
        assert "take that line out" in err
    (place / "out.jsonl.run.json").write_text("[]")
    code, _, err = go("--seed", 1)
    assert code == 2
    assert "out.jsonl.run.json: cannot be used" in err


BAD = [
    ('{"promt": "x"}', "in.jsonl:2: unknown key 'promt'; did you mean 'prompt'"),
    ('{"prompt": 5}', "in.jsonl:2: prompt: got 5, allowed: a text"),
    ('{"prompt": "x"', "in.jsonl:2: no JSON at character 15: "),
    ('{"prompt": "x", "prompt": "y"}', "in.jsonl:2: no JSON: 'prompt' is given twice"),
    ('{"prompt": "x", "temperature": NaN}', "in.jsonl:2: no JSON: NaN is no number of JSON"),
    ('{"prompt": "x", "temperature": -1}', "in.jsonl:2: temperature: got -1, allowed: a number from 0 on"),
    ('{"prompt": "x", "temperature": "1"}', "in.jsonl:2: temperature: got '1', allowed: a number from 0 on"),
    ('{"prompt": "x", "stop": 5}', "in.jsonl:2: stop: got 5, allowed: a text or a list of texts"),
    ('{"prompt": "x", "stop_token_ids": "1"}', "in.jsonl:2: stop_token_ids: got '1', allowed: a list of token ids"),
    (
        '{"prompt": "x", "token_ids": [1]}',
        "in.jsonl:2: got prompt and token_ids of prompt, messages, token_ids; give one",
    ),
    ('{"id": "x"}', "in.jsonl:2: got none of prompt, messages, token_ids; give one"),
    ('{"prompt": "x", "id": [1]}', "in.jsonl:2: id: got a list, allowed: a text or a whole number"),
    ('{"token_ids": []}', "in.jsonl:2: token_ids: got a list, allowed: a list of token ids that is not empty"),
    ('{"token_ids": [true]}', "in.jsonl:2: token_ids: got a list"),
    ('{"token_ids": [1, 300]}', "in.jsonl:2: got token id 300, allowed: 0 to 299"),
    ('{"messages": [{"role": "user"}]}', "in.jsonl:2: messages[0]: got a mapping, allowed: "),
    ('{"messages": []}', "in.jsonl:2: messages: got a list, allowed: a list of "),
    ('["x"]', 'in.jsonl:2: got a list, allowed: an object such as {"prompt": "..."}'),
    ('{"prompt": "\\ud800"}', "in.jsonl:2: character 0 ('\\ud800') is half of a surrogate pair"),
    ("[" * 100_000, "in.jsonl:2: no JSON"),
    (
        '{"prompt": "' + "word " * 30 + '"}',
        "too many: prompt and answer share 40 positions, and an answer needs at least one",
    ),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=range(len(BAD)))
def test_a_wrong_line_is_told_before_anything_is_answered(place, go, line, says):
    (place / "in.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    code, _, err = go("--max-model-len", 40)
    assert code == 2
    assert err.startswith("nanovllm: in.jsonl:2: ")
    assert says in err
    assert not list(place.glob("out.jsonl*"))


def test_many_wrong_lines_are_told_together(place, go):
    write(place / "in.jsonl", [{"prompt": "x" * 100}] * 13)
    code, _, err = go("--max-model-len", 40)
    assert code == 2
    assert err.count("in.jsonl:") == 10
    assert "in.jsonl:4: has 101 tokens, 62 too many" in err
    assert err.endswith("and 3 more\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--top-k", 0), "--top-k: got 0, allowed: 1 and more"),
        (("--stop-token-id", -1), "--stop-token-id: got (-1,), allowed: token ids"),
        (("--n", 0), "--n: got 0, allowed: 1 to 1024"),
        (("--batch-size", 0), "--batch-size: got 0"),
        (("--max-model-len", 0), "--max-model-len: got 0, the model takes 1 to 4096"),
        (("--kernels", "tirton"), "did you mean 'triton'"),
        (("--out", "in.jsonl"), "--out: got in.jsonl, which is the input"),
        (("--out", "."), "--out: got ., which is no file"),
        (("--out", "no/such.jsonl"), "--out: got no/such.jsonl, and there is no folder no; make it"),
        (("--file", "nothere.jsonl"), "nothere.jsonl: no such file"),
        (("--file", "in.json"), "in.json: a file of prompts is .jsonl (one object a line) or .txt (one prompt a line)"),
        (("--file", "model.jsonl"), "model.jsonl: is no file"),
        (("--file", "empty.jsonl"), "empty.jsonl: holds no prompt"),
        (("--file", "latin.txt"), "latin.txt:2: byte 1 is not valid UTF-8"),
    ],
)
def test_wrong_flags(place, go, words, says):
    write(place / "in.jsonl", questions(2))
    (place / "empty.jsonl").write_text("\n\n")
    (place / "latin.txt").write_bytes(b"a\n\xe4\n")
    (place / "model.jsonl").mkdir()
    code, _, err = go(*words)
    assert code == 2
    assert says in err
    assert not list(place.glob("out.jsonl*"))


def test_a_model_without_a_template_says_what_to_do(place, go, small_model):
    (place / "model").unlink()
    shutil.copytree(small_model, place / "model")
    config = json.loads((place / "model" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (place / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    write(place / "in.jsonl", [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}])
    code, _, err = go()
    assert code == 2
    assert "in.jsonl:2: messages: " in err
    assert "has no chat template; give `prompt` instead of `messages`" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_two_processes_never_write_one_file(place):
    write(place / "in.jsonl", questions(400))
    first = start(place)
    written(place, 2, first)
    second = start(place)
    _, err = second.communicate(timeout=WAIT)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "out.jsonl: another process is writing there" in err
