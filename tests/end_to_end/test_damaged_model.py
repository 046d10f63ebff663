"""The final model's folder, damaged: `LLM` and `nanovllm generate` say what is wrong with it in one message."""

import json
import random
import shutil

import pytest

from nanovllm_core import LLM, Machine, SamplingParams
from nanovllm_core.cli import main
from nanovllm_core.errors import ModelError, RefusedError

PAGE = 4096
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An exported model: the smallest preset that there is, in bfloat16."""
    from nanovllm_core import Recipe, Registry
    from nanovllm_core.assemble import assemble, models_of, tokenizer_of
    from nanovllm_core.plan_model import plan_model
    from nanovllm_core.training.export import export

    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": 300}}
    plan = plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())
    folder = tmp_path_factory.mktemp("whole")
    module = assemble(plan, "cpu", seed=1, training=False).module
    tokenizer = tokenizer_of(plan, lambda: ["the river runs past old mills"])
    export(folder, module.named_parameters(), models_of(plan).config(shape=plan.shape), tokenizer, "bfloat16")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def message(folder):
    """What LLM raises, always of the two kinds that it documents; None when it answers."""
    try:
        LLM(folder, machine=Machine()).generate("the river", SamplingParams(temperature=0, max_tokens=1))
    except (ModelError, RefusedError) as e:
        return str(e)
    return None


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("how", ["missing", "empty", "a folder", "half", "one byte less"])
def test_a_file_that_is_not_whole(copy, capsys, name, how):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "one byte less": content[:-1]}[how])
    if how == "one byte less" and name == "config.json":
        path.write_bytes(content[:-2])  # after the line's end, the bracket
    said = message(copy)
    assert said is not None
    assert str(copy) in said
    assert main(["generate", str(copy), "--prompt", "the river", "--max-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nanovllm: ")
    assert "Traceback" not in err


def test_weights_cut_at_every_page(copy):
    from nanovllm_core.weights import ModelFolder

    path = copy / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        for cut in range(size - size % PAGE, -1, -PAGE):
            file.truncate(cut)
            with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
                ModelFolder.open(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_flipped_bit_is_an_error_of_ours_or_another_model(copy, name):
    """No manifest stands beside a final model: a bit may make another number of a number. It never makes a traceback."""
    path, draw = copy / name, random.Random(name)
    content = path.read_bytes()
    said = []
    for _ in range(8):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(7)
        path.write_bytes(changed)
        said.append(message(copy))
    assert all(text is None or str(copy) in text for text in said)


def test_json_of_another_type(copy):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        content = (copy / name).read_bytes()
        for value in (None, 3, "text", [], [1]):
            (copy / name).write_text(json.dumps(value))
            assert str(copy) in (message(copy) or ""), (name, value)
        (copy / name).write_bytes(content)
    assert message(copy) is None
