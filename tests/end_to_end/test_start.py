"""What a command imports before it begins: seconds of a user's time, so what nobody uses stays out."""

import json
import shutil
import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch.distributed.tensor", "transformers.models.auto.modeling_auto", "sympy", "triton")
CODE = """
import json, sys
from nanovllm_core.cli import main
code = main(json.loads(sys.argv[1]))
print("imported:", *(m for m in json.loads(sys.argv[2]) if m in sys.modules))
sys.exit(code)
"""


def imported(folder, *words):
    """Heavy modules that a command imported."""
    given = [sys.executable, "-c", CODE, json.dumps([*map(str, words)]), json.dumps(HEAVY)]
    done = subprocess.run(given, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("imported:")[2].split()


def test_generating_imports_no_models_of_transformers_and_no_compiler(small_model, tmp_path):
    assert imported(tmp_path, "generate", small_model, "--prompt", "x", "--max-tokens", 1) == []


def test_a_run_imports_none_either(folder):
    assert imported(folder, "run", "recipe.yaml") == []


@pytest.mark.parametrize(
    ("change", "generic"),
    [({}, True), ({"tokenizer_class": "Qwen2Tokenizer"}, False), ({"auto_map": {"AutoTokenizer": ["a", "b"]}}, False)],
    ids=str,
)
def test_a_tokenizer_is_opened_as_autotokenizer_opens_it(small_model, tmp_path, change, generic):
    from nanovllm_tokenizers.hf import _is_generic, load
    from transformers import AutoTokenizer

    folder = shutil.copytree(small_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert _is_generic(folder) == generic
    if change:
        return
    ours, theirs = load(str(folder)).opened, AutoTokenizer.from_pretrained(str(folder))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert (ours.eos_token_id, ours.chat_template) == (theirs.eos_token_id, theirs.chat_template)
    for kind in ("qwen2", "no-such-model", None):  # AutoTokenizer has a class of its own for the first
        config = {**json.loads((small_model / "config.json").read_text()), "model_type": kind}
        (folder / "config.json").write_text(json.dumps(config))
        assert _is_generic(folder) == (kind == "no-such-model")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        ("models.auto.tokenization_auto", "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"),
    ],
)
def test_tables_read_from_source_are_those_that_an_import_gives(module, name):
    from importlib import import_module

    from nanovllm_core.literals import literal

    there = getattr(import_module(f"transformers.{module}"), name)
    assert literal("transformers", module, name) == there
    assert len(there) > 10


def test_what_is_no_literal_is_imported(tmp_path, monkeypatch):
    from nanovllm_core.literals import literal

    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "__init__.py").write_text("")
    (tmp_path / "some" / "tables.py").write_text("A = {'a': 1}\nB = dict(A, b=2)\nC: dict = dict([('c', 3)])\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [literal("some", "tables", name) for name in "ABC"] == [{"a": 1}, {"a": 1, "b": 2}, {"c": 3}]
    with pytest.raises(AttributeError):
        literal("some", "tables", "D")
    with pytest.raises(ImportError):
        literal("no_such_package", "tables", "A")
