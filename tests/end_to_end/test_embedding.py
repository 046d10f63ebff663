"""The core without its command line: the examples, twice in a process, and registries side by side."""

import http.client
import importlib.util
import json
import runpy
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from attrs import frozen

from nanovllm_core import LLM, Machine, Recipe, Record, Registry, SamplingParams, hookimpl, make_plan, run
from nanovllm_core.contracts import Accept

EXAMPLES = Path(__file__).parents[2] / "examples"
RIVER = tuple(f"The river runs past old mills, {n} miles to the sea." for n in range(40))
SNOW = tuple(f"Snow fell on {n} roofs while everyone was asleep." for n in range(40))


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_runs_as_its_docstring_says(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "embed.py", tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["1", "10", "20"]
    assert "".join(lines[3:]).strip()
    assert done.stderr == ""


def test_the_script_runs_twice_in_one_process(tmp_path, capsys, monkeypatch):
    said = []
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["embed.py", str(tmp_path / name)])
        runpy.run_path(str(EXAMPLES / "embed.py"))
        said.append(capsys.readouterr().out.splitlines()[:3])
    assert said[0] == said[1]


@frozen(kw_only=True, eq=False)
class Memory:
    """Texts that stand in memory."""

    texts: tuple[str, ...]

    @hookimpl
    def probe(self, source):
        return Accept(why="in memory")

    @hookimpl
    def read(self, source):
        return iter([Record(value=text, source=source.name, index=i) for i, text in enumerate(self.texts)])


class Watch:
    def __init__(self):
        self.losses = []

    @hookimpl
    def step_done(self, step, metrics):
        self.losses.append(metrics["loss"])


def trained(texts, folder):
    """A run of its own registry: the losses, and what the model says."""
    registry, watch = Registry.from_environment().extended(readers={"memory": Memory(texts=texts)}), Watch()
    recipe = {
        "data": {"path": "memory", "readers": ["memory"], "max_seq_length": 64},
        "tokenizer": {"use": "bpe", "size": 300},
        "model": {"use": "preset", "size": "tiny"},
        "train": {"max_steps": 10, "learning_rate": 2e-3, "logging_steps": 1},
        "callbacks": [],
        "output_dir": str(folder),
    }
    run(make_plan(Recipe.from_data(recipe), registry, Machine()), callbacks=[watch])
    answer = LLM(folder, registry=registry).generate(["The "], SamplingParams(temperature=0, max_tokens=12))
    return watch.losses, answer


def test_two_registries_side_by_side_share_nothing(tmp_path, capfd):
    """Each in its turn, then both at once in two threads: losses and answers are the same to the last bit."""
    alone = [trained(texts, tmp_path / f"alone-{i}") for i, texts in enumerate((RIVER, SNOW))]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(trained, texts, tmp_path / f"both-{i}") for i, texts in enumerate((RIVER, SNOW))]
        assert [job.result() for job in jobs] == alone
    assert alone[0] != alone[1]
    assert capfd.readouterr() == ("", "")  # what is said, callbacks say


RECIPE = """\
data: {{path: {path}, max_seq_length: 64}}
tokenizer: {{use: bpe, size: 300}}
model: {{use: preset, size: tiny}}
train: {{max_steps: {steps}, learning_rate: 2e-3, gradient_accumulation_steps: 1, logging_steps: 1}}
generate: {{prompts: ["The river"], max_tokens: 5, temperature: 0}}
callbacks: []
output_dir: {output}
"""


@pytest.fixture
def service(tmp_path):
    """A client of a running service: `service(method, path, body)` gives status and value."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.txt").write_text(" ".join(RIVER))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"text": "one"}\nno json\n')
    server = example("service").Service(tmp_path)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def call(method, path, body=None, headers={}):  # noqa: B006
        client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        client.request(method, path, body=body, headers=headers)
        answer = client.getresponse()
        value = json.loads(answer.read())
        client.close()
        return answer.status, value

    yield call
    server.close()


def ended(service, number):
    """The run, once it is over, and the states that it was seen in."""
    seen = []
    for _ in range(3000):
        status, told = service("GET", f"/runs/{number}")
        assert status == 200
        seen += [told["state"]] if told["state"] not in seen else []
        if told["state"] in ("finished", "failed"):
            return told, seen
        time.sleep(0.02)
    raise AssertionError(told)


def test_the_service_runs_recipes_one_after_another(service):
    """One that works, one whose documents are bad, and one more that works: all handed in at once."""
    for path, output in (("good", "first"), ("bad", "second"), ("good", "third")):
        status, told = service("POST", "/runs", RECIPE.format(path=path, output=output, steps=12))
        assert (status, told["state"]) == (202, "waiting")
    assert service("GET", "/runs/3/text?prompt=a")[0] == 409
    first, seen = ended(service, 1)
    assert (first["state"], first["done"], first["total"], first["unit"]) == ("finished", 12, 12, "steps")
    assert "running" in seen
    assert 0 < first["loss"] < 6
    assert any("documents" in note for note in first["notes"])
    second, _ = ended(service, 2)
    assert second["state"] == "failed"
    assert second["error"].startswith("a.jsonl:2:16: ")
    third, _ = ended(service, 3)
    assert third["loss"] == first["loss"]
    assert third["answers"] == first["answers"]
    status, said = service("GET", f"/runs/3/text?prompt={quote('The river')}")
    assert status == 200
    assert said["text"].startswith(third["answers"]["The river"])
    assert [job["state"] for job in service("GET", "/runs")[1]] == ["finished", "failed", "finished"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", "/runs", "model: {use: presett}\ndata: {path: good}", 400, "did you mean 'preset'?"),
        ("POST", "/runs", "a: [", 400, "recipe:1"),
        ("POST", "/runs", b"\xff", 400, "utf-8"),
        ("POST", "/runs", b"", 400, "data.path is missing"),
        ("POST", "/run", "", 404, "only /runs"),
        ("GET", "/runs/1", None, 404, "/runs/N"),
        ("GET", "/runs/x/y/z", None, 404, "/runs/N"),
        ("GET", "/", None, 404, "/runs/N"),
    ],
)
def test_the_service_answers_mistakes_with_the_cores_own_words(service, method, path, body, status, told):
    code, value = service(method, path, body)
    assert code == status
    assert told in value["error"]
    assert service("GET", "/runs") == (200, [])


def test_the_service_reads_no_recipe_without_end(service):
    status, value = service("POST", "/runs", headers={"Content-Length": str(1 << 40)})
    assert (status, value) == (400, {"error": f"Content-Length: got '{1 << 40}', allowed: up to {1 << 20}"})
