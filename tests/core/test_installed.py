"""What is announced where distributions shadow each other, and what a name may be."""

import os
import subprocess
import sys

import pytest

from nanovllm_core import Registry
from nanovllm_core.errors import BrokenComponent, OptionError, RecipeError
from nanovllm_core.installed import installed
from nanovllm_core.options import public

MODULE = """
from attrs import frozen
from nanovllm_core.hookspecs import hookimpl

@frozen(kw_only=True, eq=False)
class Part:
    '''Passes on.'''
    sep_token: str = "|"
    api_key: str = "k"
    @hookimpl
    def extract(self, record):
        return None
"""


def write(folder, distribution, module, points, code=MODULE):
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    if points:
        (info / "entry_points.txt").write_text(f"[nanovllm.extractors]\n{points} = {module}:Part\n")
    (folder / f"{module}.py").write_text(code)


def test_a_shadowed_copy_announces_nothing_and_one_distribution_is_one(tmp_path, monkeypatch):
    write(tmp_path / "first", "foo", "foo_part", "")
    write(tmp_path / "second", "foo", "foo_part", "stale")
    write(tmp_path / "first", "Under_Score", "us_part", "us")
    write(tmp_path / "second", "under-score", "us_part", "us")
    for folder in ("second", "first"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    found = [e.full_name for e in installed() if e.name in ("stale", "us")]
    assert found == ["Under_Score/us"]


@pytest.mark.parametrize("name", ["a/b", "auto", "", "two words"])
def test_a_given_name_that_no_recipe_can_write_is_broken(name):
    registry = Registry.of(extractors={name: object()})
    assert registry.rows()[0].state == "broken"
    with pytest.raises(BrokenComponent, match="its name"):
        registry.load(registry.entries[0])


def test_a_token_that_is_no_secret_counts(tmp_path, monkeypatch):
    write(tmp_path, "plain", "plain_part_of_a_test", "plain")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry.from_environment()
    part = registry.load(registry.find("extractors", "plain"))(sep_token="#", api_key="private")
    assert public(part) == {"sep_token": "#", "api_key": "***"}


def test_a_neighbours_thread_does_not_keep_a_command_from_ending(tmp_path):
    code = "import threading, time\nthreading.Thread(target=lambda: time.sleep(1000)).start()\n" + MODULE
    write(tmp_path, "thready", "thready_part", "thready", code)
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm_core.cli", "plugins"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "thready" in done.stdout


def test_an_import_that_is_stopped_inside_torch_is_told_as_what_it_is(tmp_path):
    write(tmp_path, "slow", "slow_part", "slow", "import time, torch\ntime.sleep(1000)\n")
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm_core.cli", "plugins", "--timeout", "6"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was stopped inside torch, which a process can begin to import only once" in done.stdout
    assert "--without extractors:slow" in done.stdout


def test_numbers_from_data_are_finite(tmp_path):
    from nanovllm_core import Recipe

    for value in (float("inf"), float("nan")):
        with pytest.raises(RecipeError, match=r"train\.learning_rate: got .*, expected a finite number"):
            Recipe.from_data({"train": {"learning_rate": value}})
    with pytest.raises(RecipeError, match="per_device_train_batch_size: got 1000000000000, between 1 and 1000000"):
        Recipe.from_data({"train": {"per_device_train_batch_size": 10**12}})
    assert issubclass(OptionError, RecipeError)
