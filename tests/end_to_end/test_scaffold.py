"""`nanovllm new`: every kind is written, installed as a stranger's distribution, tested by the kit and listed; and what
is refused."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nanovllm_core.cli import main
from nanovllm_core.errors import ComponentError, OutputError, UnknownComponent
from nanovllm_core.hookspecs import SPECS
from nanovllm_core.scaffold import WORDS, new

ROOT = Path(__file__).parents[2]
NAMES = {kind: f"My-{word}_2" for kind, word in WORDS.items()}  # letters of both cases, a digit, both signs


def call(*command, folder, path):
    """A process that finds the distributions in `path`, too."""
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a distribution of each kind, and the folder where they are installed."""
    folder = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        new(kind, name, folder / kind)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    call(*pip, "installed", *(f"./{kind}" for kind in NAMES), folder=folder, path="")
    return folder, folder / "installed"


def test_every_kind_passes_the_kit_as_it_was_written(written):
    folder, installed = written
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    assert " passed" in call(*pytest_, *(f"{kind}/tests" for kind in NAMES), folder=folder, path=installed)


def test_every_kind_is_listed_and_its_options_are_shown(written):
    folder, installed = written
    cli = [sys.executable, "-m", "nanovllm_core.cli"]
    rows = json.loads(call(*cli, "plugins", "--json", folder=folder, path=installed))
    ours = {(r["kind"], r["name"]): r for r in rows if r["distribution"] != "nanovllm"}
    assert {key: r["state"] for key, r in ours.items()} == dict.fromkeys(NAMES.items(), "ok")
    assert all(r["summary"] for r in ours.values())
    shown = call(*cli, "plugins", f"readers:{NAMES['readers']}", folder=folder, path=installed)
    assert "comment: lines that begin with this are left out" in shown


RECIPE = """\
data: {{path: docs, readers: [{readers}], extractors: [{extractors}, fields], max_seq_length: 64}}
tokenizer: {tokenizers}
model: {{use: {models}, hidden: 32, layers: 2}}
kernels: {{swiglu: {kernels}}}
parallel: {parallel}
train: {{max_steps: 3, gradient_accumulation_steps: 1, logging_steps: 1}}
callbacks: [{callbacks}]
output_dir: out
"""


def test_one_recipe_uses_all_seven_as_they_were_written(written):
    folder, installed = written
    (folder / "docs").mkdir()
    (folder / "docs" / f"a.{NAMES['readers'].lower()}").write_text(
        "# no document\n" + "the river runs past old mills\n" * 9
    )
    (folder / "recipe.yaml").write_text(RECIPE.format(**NAMES))
    cli = [sys.executable, "-m", "nanovllm_core.cli"]
    call(*cli, "run", "recipe.yaml", folder=folder, path=installed)
    table = (folder / "out" / f"{NAMES['callbacks']}.tsv").read_text()
    assert [line.split("\t")[0] for line in table.splitlines()] == ["1", "2", "3"]
    said = call(*cli, "generate", "out", "--prompt", "the river", "--max-tokens", "5", folder=folder, path=installed)
    assert said.startswith("the river")


def test_the_readme_says_how_a_recipe_names_it(written):
    folder, _ = written
    readme = (folder / "readers" / "README.md").read_text()
    assert "readers: [auto, My-reader_2]" in readme
    assert "$" not in readme


def test_the_command_says_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "callbacks", "bell"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("callbacks:bell is in nanovllm-bell/src/nanovllm_bell/component.py: edit it there.")
    for step in ("cd nanovllm-bell", "pip install -e '.[test]'", "pytest", "nanovllm plugins callbacks:bell"):
        assert f"\n  {step}\n" in out
    assert sorted(p.name for p in Path("nanovllm-bell").iterdir()) == ["README.md", "pyproject.toml", "src", "tests"]
    assert main(["new", "callbacks", "bell"]) == 2  # it stands there already
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "1st", "a b", "a/b", "-a", "a-", "naïve", "a.b", "a" * 51, "auto", "Auto"])
def test_names_that_no_recipe_could_write_are_refused(name, tmp_path):
    with pytest.raises(ComponentError, match="new: "):
        new("readers", name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("readers", "txt", r"readers:txt is installed, from nanovllm [\d.]+"),
        ("readers", "core", "a package nanovllm_core is installed already"),
        ("callbacks", "Kernels", "a package nanovllm_kernels is installed already"),
    ],
)
def test_names_that_are_taken_are_refused(kind, name, told, tmp_path):
    with pytest.raises(ComponentError, match=told):
        new(kind, name, tmp_path / "new")


def test_other_mistakes(tmp_path):
    with pytest.raises(UnknownComponent, match="did you mean 'readers'"):
        new("reader", "mine", tmp_path / "new")
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="new: "):
            new("readers", "mine", folder)


def test_there_is_a_word_for_every_kind():
    assert list(WORDS) == list(SPECS)


def test_the_wheel_holds_every_template(tmp_path):
    """Hatchling leaves out what a .gitignore or its settings name."""
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    name = call(sys.executable, "-c", build, str(tmp_path), folder=ROOT, path="").strip().splitlines()[-1]
    held = {n for n in zipfile.ZipFile(tmp_path / name).namelist() if "/scaffold/templates/" in n}
    assert held == {p.relative_to(ROOT).as_posix() for p in (ROOT / "nanovllm_core").rglob("templates/**/*.txt")}
