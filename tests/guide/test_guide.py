"""What the guide says is true: its blocks run, its keys mean what a recipe says, its objects do what it tells."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanovllm import TrainingConfig
from nanovllm_core.cli import main
from nanovllm_core.errors import RecipeError
from nanovllm_core.guide.keys import MEANT, TABLE, config_text, recipe_of

HERE, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


blocks, names, keys = loaded(HERE / "blocks.py"), loaded(HERE / "names.py"), loaded(DOCS / "keys.py")
# One of each road, those that take seconds: fine-tuning by shell and Python, documents, a data set, memory, a loop, a
# checkpoint, a new model, several ranks. `python tests/guide/blocks.py` runs all, whose result is in benchmarks/results.
CHOSEN = (1, 9, 11, 16, 24, 25, 27, 29, 36, 51)


def test_there_are_58_blocks_and_each_is_run_or_said_why_not():
    found = blocks.blocks()
    count = {kind: sum(b["language"] == kind for b in found) for kind in ("python", "bash", "json")}
    assert (len(found), count) == (58, {"python": 25, "bash": 16, "json": 14})
    idle = {b["number"]: blocks.idle(b) for b in found if blocks.idle(b)}
    assert idle == {3: "installs packages", 4: "installs packages", 5: "installs packages"} | dict.fromkeys(
        (6, 10), "a tree of files"
    )


def test_blocks_of_every_road_run(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, HERE / "blocks.py", *map(str, CHOSEN), "--out", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert (told["ran"], told["able"]) == (len(CHOSEN), len(CHOSEN))


def test_everything_that_the_guide_names_is_used_by_a_block_or_a_test():
    assert names.page() == names.PAGE.read_text(encoding="utf-8"), "run: python tests/guide/names.py"
    assert len(names.table()) > 120
    for use, numbers in names.table().items():
        if not numbers:
            file, _, test = names.TESTS[use].partition("::")
            assert f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), use


def test_every_key_and_flag_of_the_guide_is_one():
    guide = blocks.GUIDE.read_text(encoding="utf-8")
    flags = set(re.findall(r"--([a-z]\w+)", guide)) - {"nproc_per_node", "config"}
    named = set(
        re.findall(r'"([a-z]\w+)":', "".join(b["text"] for b in blocks.blocks() if '"dataset_path"' in b["text"]))
    )
    configs = [c for b in blocks.blocks() for c in re.findall(r"TrainingConfig\((.*?)^\)", b["text"], re.S | re.M)]
    given = set(re.findall(r"^\s+(\w+)=", "\n".join(configs), re.M))
    assert (flags | named | given) - {"text"} <= TABLE.keys()
    assert given >= {
        "model_name_or_path",
        "train_from_scratch",
        "vocab_size",
        "mixed_precision",
        "concatenate_documents",
    }


def test_the_table_of_keys_is_that_of_the_code():
    page = (DOCS / "guide.md").read_text(encoding="utf-8")
    assert keys.updated(page) == page, "run: python docs/keys.py"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes" / "guide").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configurations_are_recipes(path):
    recipe = recipe_of(config_text(path), Path.cwd())
    given = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_") and k not in MEANT}
    plain = recipe.to_data()
    assert given
    for key, value in given.items():
        section, _, name = TABLE[key].recipe.partition(".")
        assert plain[section][name] == value


def test_a_configuration_is_the_recipe_that_it_means():
    recipe = TrainingConfig(
        train_from_scratch=True, model_size="medium", vocab_size=900, dataset_path="docs", tensor_parallel_size=2,
        data_parallel_size=3, dataloader_num_workers=0, learning_rate=1e-3, freeze="model.layers.0.*",
    ).recipe().to_data()  # fmt: skip
    assert recipe["model"] == {"use": "preset", "size": "medium"}
    assert recipe["tokenizer"] == {"use": "auto", "size": 900}
    assert recipe["parallel"] == {"use": "mesh", "data": 3, "tensor": 2}
    assert (recipe["data"]["path"], recipe["data"]["workers"]) == ("docs", 1)
    assert (recipe["train"]["learning_rate"], recipe["train"]["freeze"]) == (1e-3, ["model.layers.0.*"])
    assert TrainingConfig(tensor_parallel_size=4).recipe().to_data()["parallel"] == {"use": "tensor", "size": 4}
    tuned = TrainingConfig(model_name_or_path="Qwen/Qwen3-0.6B").recipe().to_data()
    assert tuned["model"] == {"use": "pretrained", "path": "Qwen/Qwen3-0.6B"}


def test_a_configuration_is_an_object():
    config = TrainingConfig(learning_rate=1e-4)
    assert (config.learning_rate, config.num_train_epochs, config.model_size) == (1e-4, 3, None)
    config.num_train_epochs = 7
    assert config.to_dict()["num_train_epochs"] == 7
    with pytest.raises(RecipeError, match="num_train_epochs: got -1"):
        config.num_train_epochs = -1
    assert config.num_train_epochs == 7
    assert config == TrainingConfig(learning_rate=1e-4, num_train_epochs=7)
    with pytest.raises(AttributeError):
        config.learning_rat  # noqa: B018


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"learning_rat": 1e-4}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"learning_rate": "fast"}, "learning_rate: got 'fast', expected number"),
        ({"model_size": 3}, "model_size: got 3, expected string or null"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: got 0, at least 1"),
        ({"dataloader_num_workers": -3}, "dataloader_num_workers: got -3, at least 0"),
        ({"train_from_scratch": "yes"}, "train_from_scratch: got 'yes', expected true or false"),
    ],
)
def test_what_cannot_be_is_told(given, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        TrainingConfig(**given)


def test_all_blocks_have_been_run():
    told = json.loads(max((REPOSITORY / "benchmarks" / "results").glob("guide-*.json")).read_text(encoding="utf-8"))
    idle = {b["number"] for b in blocks.blocks() if blocks.idle(b)}
    ran = {row["number"] for row in told["blocks"] if row["outcome"] == "ran"}
    assert ran == {b["number"] for b in blocks.blocks()} - idle


def test_flags_go_over_files_and_the_recipe_is_printed(tmp_path, capsys):
    for name, given in (("a", {"learning_rate": 1e-4, "seed": 1}), ("b", {"seed": 2, "chunk_overlap": 7})):
        (tmp_path / name).write_text(json.dumps(given))
    files = ["--config", str(tmp_path / "a"), "--config", str(tmp_path / "b")]
    assert main(["train", *files, "--learning_rate", "3e-4", "--print-recipe"]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert (recipe["train"]["learning_rate"], recipe["train"]["seed"]) == (3e-4, 2)
    assert recipe["data"]["chunk_overlap"] == 7


def test_code_of_the_page_runs(tmp_path):
    blocks.prepare(tmp_path / "cache")
    found = [b for b in blocks.blocks(DOCS / "guide.md") if b["language"] == "python"]
    assert len(found) == 4
    (tmp_path / "work").mkdir()
    for block in found:
        told = blocks.run(block, tmp_path / "cache", tmp_path / "work")
        assert told["outcome"] == "ran", told
        assert "completed" not in told, told


def test_keys_of_a_new_model_are_refused_where_none_is_asked_for(capsys):
    assert main(["train", "--model_size", "small", "--print-recipe"]) == 2
    assert "--model_size: model_size is of a new model; set train_from_scratch" in capsys.readouterr().err
    assert main(["train", "--train_from_scratch", "--model_name_or_path", "x", "--print-recipe"]) == 2
    assert "and train_from_scratch asks for a new one: leave one of the two out" in capsys.readouterr().err


def test_one_copy_is_one_process():
    assert TrainingConfig(data_parallel_size=1).recipe().to_data()["parallel"] == "single"


def test_a_file_is_told_with_its_place(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{\n\t"_comment": "tabs are allowed",\n\t"dataset_path": "docs",\n\t"seeed": 3\n}\n')
    with pytest.raises(RecipeError, match=r"c\.json:4:\d+: unknown key 'seeed'; did you mean 'seed'"):
        recipe_of(config_text(file), tmp_path)
