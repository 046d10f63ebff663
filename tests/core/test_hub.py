"""Names of models: folders, the Hugging Face cache, and what is said when a name is neither."""

import json
import os
import subprocess
import sys

import pytest

from nanovllm_core.errors import ModelError
from nanovllm_core.hub import resolve

NAME, REVISION = "some-team/small-model", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A cache folder as the hub's client lays it out."""
    repo = tmp_path / "models--some-team--small-model"
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    (snapshot / "config.json").write_text("{}")
    return tmp_path


def resolved(cache, name, **options):
    """`resolve` in a process of its own: the hub's client reads its environment once, when it is imported."""
    code = (
        "import sys; from nanovllm_core.hub import resolve; from nanovllm_core.errors import ModelError\n"
        f"try: print(resolve({name!r}, **{options!r}))\nexcept ModelError as e: sys.exit(str(e))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_a_hub_name_is_found_in_the_cache_without_a_network(cache):
    snapshot = cache / "models--some-team--small-model" / "snapshots" / REVISION
    done = resolved(cache, NAME, weights=False)
    assert done.stdout.strip() == str(snapshot), done.stderr
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolved(cache, NAME).stdout.strip() == str(snapshot)


def test_a_name_that_is_nowhere_says_how_to_get_it(cache):
    done = resolved(cache, "some-team/absent")
    assert done.returncode == 1
    assert "some-team/absent: not a folder here, not in the Hugging Face cache" in done.stderr
    assert "hf download some-team/absent" in done.stderr


@pytest.mark.parametrize(
    ("name", "nearest"), [("1.8B", "Qwen/Qwen3-1.7B and Qwen/Qwen3-4B"), ("7B", "Qwen/Qwen3-8B and Qwen/Qwen3-4B")]
)
def test_a_size_that_a_family_does_not_have_names_the_nearest(cache, name, nearest):
    done = resolved(cache, f"Qwen/Qwen3-{name}")
    assert f"its family has no such size, the nearest are {nearest}" in done.stderr
    assert "hf download" not in done.stderr


def test_a_cached_model_without_weights_is_not_taken_for_whole(cache):
    assert "holds no safetensors weights" in resolved(cache, NAME).stderr


def test_a_sharded_model_is_whole_when_every_file_of_its_index_is_there(cache):
    repo = cache / "models--some-team--small-model"
    snapshot, blobs = repo / "snapshots" / REVISION, repo / "blobs"
    blobs.mkdir()
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"weight_map": {f"tensor_{shard}": shard for shard in shards}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, shard in enumerate(shards):  # a finished download is a blob, and a link to it
        lacking = f"holds no {shard} ({3 - number} of the 3 files that model.safetensors.index.json names are missing)"
        assert lacking in resolved(cache, NAME).stderr
        (blobs / f"{number}.incomplete").write_bytes(b"half")
        (blobs / f"{number}").write_bytes(b"")
        (snapshot / shard).symlink_to(blobs / f"{number}")
    assert resolved(cache, NAME).stdout.strip() == str(snapshot)
    (blobs / "1").unlink()
    assert f"holds no {shards[1]} (1 of" in resolved(cache, NAME).stderr
    assert resolved(cache, NAME, weights=False).stdout.strip() == str(snapshot)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": 1}}'])
def test_weights_without_a_readable_index_are_not_whole(cache, index):
    snapshot = cache / "models--some-team--small-model" / "snapshots" / REVISION
    (snapshot / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "holds no safetensors weights" in resolved(cache, NAME).stderr
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert "holds no readable model.safetensors.index.json" in resolved(cache, NAME).stderr


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name):
    with pytest.raises(ModelError, match="empty"):
        resolve(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(tmp_path / "model.gguf"))
