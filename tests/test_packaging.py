"""What no tool checks by itself: the wheel's package list, README's commands in CI, what an import brings along."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_lists_every_package():
    listed = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    found = {str(p.parent.relative_to(ROOT)) for p in ROOT.glob("plugins/*/nanovllm_*/py.typed")}
    assert listed == found | {"nanovllm", "nanovllm_core"}


def test_the_import_contracts_cover_every_package():
    packages = {Path(p).name for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    linter = PROJECT["tool"]["importlinter"]
    assert set(linter["root_packages"]) == packages
    plugins = packages - {"nanovllm", "nanovllm_core"}
    forbidden, independent, _layers = linter["contracts"]
    assert set(forbidden["forbidden_modules"]) == plugins | {"nanovllm"}
    assert set(independent["modules"]) == plugins


def test_readmes_commands_are_those_of_ci():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv") and "-c constraints" in line]
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command}\n" in ci


@pytest.mark.parametrize(
    "code",
    [
        "import nanovllm_core",
        "import nanovllm",
        "from nanovllm_core.cli import main; main(['plugins'])",
        "from nanovllm_core.cli import main; main([])",
        "from nanovllm_core.registry import Registry; r = Registry.from_environment(); [r.load(e) for e in r.entries]",
    ],
)
def test_light_commands_bring_no_heavy_library(code):
    check = (
        f"{code}\nimport sys\nheavy = {{'torch', 'transformers', 'numpy', 'tokenizers'}} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_load():
    import nanovllm.training
    import nanovllm_core

    assert nanovllm_core.__all__ == [
        "LLM", "Document", "Machine", "NanoError", "Plan", "Recipe", "Record", "Registry", "SamplingParams", "Source",
        "analyze_document_collection", "estimate_training_memory", "hookimpl", "make_plan", "run",
    ]  # fmt: skip
    assert nanovllm.__all__ == ["LLM", "SamplingParams", "Trainer", "TrainingConfig"]
    for package in (nanovllm_core, nanovllm, nanovllm.training):
        for name in package.__all__:
            assert getattr(package, name)
    with pytest.raises(AttributeError):
        nanovllm_core.absent  # noqa: B018


def test_no_module_is_too_long():
    long = {
        str(p.relative_to(ROOT)): n
        for base in ("nanovllm", "nanovllm_core", "plugins", "benchmarks", "recipes")
        for p in (ROOT / base).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 320
    }
    assert long == {}
