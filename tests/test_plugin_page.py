"""docs/plugins.md says what the code does: its hooks, its classes, its commands; and its example passes the kit."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from nanovllm_core import contracts, errors, hookspecs, testing
from nanovllm_core.cli import main
from nanovllm_core.hooks import verify
from nanovllm_core.options import describe
from nanovllm_core.scaffold import new

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "plugins.md").read_text("utf-8")
SPEC = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def test_the_hooks_are_those_of_the_code():
    assert hooks.updated(PAGE) == PAGE, "run: python docs/hooks.py"


def test_an_undocumented_hook_stops_it(monkeypatch):
    class Bare:
        """A kind."""

        def probe(self, source: str) -> str: ...

    class Untyped:
        """A kind."""

        def probe(self, source) -> str:
            """A hook."""

    for spec, told in ((Bare, "readers.probe has no docstring"), (Untyped, "its source has no type")):
        monkeypatch.setattr(hooks, "SPECS", {"readers": spec})
        with pytest.raises(SystemExit, match=told):
            hooks.rendered()


def test_every_name_is_there():
    named = set(re.findall(r"`(\w+)[(`]", PAGE.partition("## What crosses")[2].partition("**A model that")[0]))
    assert named >= {"Source", "Record", "Module"}
    assert [n for n in named if n[0].isupper() and not hasattr(contracts, n)] == []
    contract = {n for n in testing.__all__ if n.endswith("Contract")}
    assert contract == set(re.findall(r"^\| `(\w+Contract)`", PAGE, re.MULTILINE))
    for kind in hookspecs.SPECS:
        assert f"### {kind}\n" in PAGE
    assert all(hasattr(errors, n) for n in re.findall(r"`(\w+Error)[(`]", PAGE) if n != "ValueError")
    anchors = {re.sub(r"\W", "-", h.lower()) for h in re.findall(r"^## (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) == anchors
    for target in re.findall(r"\]\((\.\.[^)]*)\)", PAGE):
        assert (DOCS / target).exists(), target


def mistakes():
    """A class with each mistake that the page explains."""

    def answer(self, source):
        return None

    def records(self, source):
        yield

    marked = {"probe": hookspecs.hookimpl(answer), "read": hookspecs.hookimpl(lambda self, source: iter(()))}
    frozen = attrs.frozen(kw_only=True, eq=False)
    yield frozen(type("Typo", (), {**marked, "prob": marked["probe"]}))
    yield frozen(type("Half", (), {"probe": marked["probe"]}))
    yield frozen(type("Yields", (), {**marked, "read": hookspecs.hookimpl(records)}))
    yield attrs.frozen(kw_only=True)(type("Equal", (), marked))
    yield frozen(type("Late", (), {**marked, "__annotations__": {"size": "NotImported"}, "size": 1}))


def test_the_messages_that_it_explains_are_those_that_come():
    table = PAGE.partition("| message | what it means |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]
    for message, cls in zip(explained, mistakes(), strict=True):
        try:
            told = verify("readers", cls) or describe(cls)
        except errors.BrokenComponent as e:
            told = str(e)
        assert message in str(told)


def test_the_example_of_the_page_works_as_it_stands_there(tmp_path, monkeypatch, capsys):
    """`nanovllm new`, the page's two files in place of those it wrote, its own tests, its recipe."""
    monkeypatch.chdir(tmp_path)
    new("readers", "srt")
    folder = tmp_path / "nanovllm-srt"
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
    [component] = [text for lang, text in blocks if lang == "python" and "class SrtReader" in text]
    [tests] = [text for lang, text in blocks if lang == "python" and "class TestSrt" in text]
    [recipe] = [text for lang, text in blocks if lang == "yaml"]
    [films] = [text for lang, text in blocks if "mkdir films" in text]
    for path in ("src/nanovllm_srt/component.py", "tests/test_component.py"):
        assert f"`{path}`" in PAGE
        assert (folder / path).is_file()
    (folder / "src/nanovllm_srt/component.py").write_text(component)
    (folder / "tests/test_component.py").write_text(tests)
    subprocess.run(["bash", "-ec", films.replace("cd ..\n", "")], cwd=tmp_path, check=True)
    (tmp_path / "recipe.yaml").write_text(recipe)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", "installed", "./nanovllm-srt"], cwd=tmp_path, check=True)
    monkeypatch.syspath_prepend(tmp_path / "installed")

    [case] = [v for k, v in _run(folder / "tests/test_component.py").items() if k == "TestSrt"]
    assert testing.failures(case) == {}
    assert main(["explain", "recipe.yaml"]) == 0
    assert "srt from nanovllm-srt 0.1.0: 8 files" in capsys.readouterr().out
    assert main(["run", "recipe.yaml", "--set", "train.max_steps=2"]) == 0
    assert "8 documents in 8 files" in capsys.readouterr().out


def _run(path):
    scope = {"__name__": "page"}
    exec(compile(path.read_text(), path, "exec"), scope)
    return scope
