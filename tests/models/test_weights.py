"""Model folders: whole, in shards, damaged and hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanovllm_core.errors import ModelError
from nanovllm_core.weights import ModelFolder

TENSORS = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5).bfloat16(), "c": torch.randn(2, 2, 2)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "one.safetensors")
    save_file({k: TENSORS[k] for k in ("b.weight", "c")}, folder / "two.safetensors")
    write_index(folder, {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        ModelFolder.open(folder)
    assert str(folder) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_reading(kind: str, request: pytest.FixtureRequest) -> None:
    folder = ModelFolder.open(request.getfixturevalue(kind))
    assert folder.names() == ("a.weight", "b.weight", "c")
    assert folder.dtype == "float32"
    for name, tensor in TENSORS.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.tensor(name).equal(tensor)
        assert folder.tensor(name).dtype == tensor.dtype
    with pytest.raises(ModelError, match=r"no tensor 'a.weigth'; did you mean 'a.weight'"):
        folder.tensor("a.weigth")


def test_the_stored_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(50).half(), "b": torch.ones(3), "c": torch.ones(4)}, tmp_path / "model.safetensors")
    assert ModelFolder.open(tmp_path).dtype == "float16"


def test_no_folder_no_config_no_weights(tmp_path: Path, whole: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    (whole / "model.safetensors").unlink()
    assert "no weights" in refused(whole)
    (whole / "config.json").unlink()
    assert "no config.json" in refused(whole)


def test_pickles_are_never_loaded(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    (whole / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(whole)
    assert "pytorch_model.bin" in message
    assert "never loaded" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": ' * 100_000, '"x"', b"\xff\xfe", " " * (5 << 20) + "{}"],
    ids=range(9),
)
def test_unsound_config(whole: Path, text: str | bytes) -> None:
    (whole / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    assert "config.json" in refused(whole)


@pytest.mark.parametrize(
    "name", ["../whole/model.safetensors", "sub/x.safetensors", "..", ".", "", "a\\b", "C:x", "a\0b", "/etc/passwd"]
)
def test_an_index_cannot_point_outside(sharded: Path, whole: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    save_file(TENSORS, sharded / "sub" / "x.safetensors")
    write_index(sharded, {"a.weight": name})
    assert "plain file name" in refused(sharded)


def test_links_out_of_the_folder_are_refused(sharded: Path, whole: Path, tmp_path: Path) -> None:
    (sharded / "one.safetensors").unlink()
    (sharded / "one.safetensors").symlink_to(whole / "model.safetensors")
    assert "link out of the model's folder" in refused(sharded)
    alias = tmp_path / "alias"
    alias.symlink_to(whole, target_is_directory=True)
    assert ModelFolder.open(alias).names() == tuple(TENSORS), "the folder itself may be a link"


def test_the_links_of_a_hugging_face_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("config.json", "model.safetensors")):
        (blobs / f"{i}f").write_bytes((whole / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i}f")
    assert ModelFolder.open(snapshot).tensor("c").equal(TENSORS["c"])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "two.safetensors").unlink(), "two.safetensors is missing"),
        (lambda f: write_index(f, {"d": "one.safetensors"}), "lacks tensor 'd'"),
        (lambda f: write_index(f, ["a"]), "weight_map"),
        (lambda f: write_index(f, {"a": 3}), "weight_map"),
        (lambda f: (f / "one.safetensors").write_bytes(b"short"), "one.safetensors: cannot be read"),
        (lambda f: cut(f / "two.safetensors"), "two.safetensors: cannot be read"),
    ],
)
def test_damaged_shards(sharded: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(sharded)
    assert named in refused(sharded)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_quantised_weights_are_refused(whole: Path) -> None:
    save_file({"a": torch.ones(4, dtype=torch.int8)}, whole / "model.safetensors")
    assert "I8" in refused(whole)
