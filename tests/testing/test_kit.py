"""The kit as a stranger meets it: light to import, collected by pytest, with messages that tell the whole story."""

from __future__ import annotations

import subprocess
import sys
from unittest import SkipTest

import pytest
from attrs import frozen

import nanovllm_core.testing
from nanovllm_core import hookimpl
from nanovllm_core.contracts import GENERATION, JOINED, OPERATIONS, Document, Segment
from nanovllm_core.testing import ExtractorContract, failures
from nanovllm_core.testing.reference import DEFINITIONS, reference_ops

STRANGER = '''
from attrs import frozen
from nanovllm_core import hookimpl
from nanovllm_core.contracts import Document, Segment
from nanovllm_core.testing import ExtractorContract

@frozen(kw_only=True, eq=False)
class Words:
    """Words."""
    @hookimpl
    def extract(self, record):
        if not isinstance(record.value, str):
            return None
        return Document(segments=(Segment(record.value.upper()),), source=record.source, index=record.index)

class TestWords(ExtractorContract):
    component = Words()
    documents = [("a", "a")]
    passed_on = [3]
'''


def test_importing_the_kit_imports_nothing_heavy():
    code = "import nanovllm_core.testing, sys; print(*sorted({'torch', 'numpy', 'transformers', 'pytest'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


def test_public_names():
    assert nanovllm_core.testing.__all__ == [
        "CallbackContract", "ExtractorContract", "KernelContract", "ModelContract", "ParallelContract", "ReaderContract",
        "TokenizerContract", "failures",
    ]  # fmt: skip


def test_every_operation_has_a_definition():
    assert set(DEFINITIONS) == {*OPERATIONS, *GENERATION, *JOINED}
    assert reference_ops("bfloat16").dtype == "bfloat16"


def test_pytest_collects_a_strangers_contract(tmp_path):
    (tmp_path / "test_words.py").write_text(STRANGER)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 10 passed, 1 skipped" in done.stdout, done.stdout
    assert "extractors: Words: 'a' gave 'A'; the contract: its text is 'a'" in done.stdout
    assert "Words is defined by the test itself" in done.stdout


@frozen(kw_only=True, eq=False)
class Plain:
    """The record's text."""

    @hookimpl
    def extract(self, record):
        return Document(segments=(Segment(str(record.value)),), source=record.source, index=record.index)


def test_failures_tell_apart_what_fails_and_what_does_not_apply(tmp_path):
    class Kit(ExtractorContract):
        component = Plain()
        documents = [("a", "a")]

        def test_one(self, tmp_path):
            assert tmp_path.is_dir()
            raise ValueError("odd")

        def test_two(self):
            raise SkipTest("does not apply")

        def test_three(self):
            self.check(1 + 1 == 2, "numbers", "they add up")
            self.check(False, "numbers", "they differ")

    assert failures(Kit) == {
        "test_one": "ValueError: odd",
        "test_three": "extractors: Plain: numbers; the contract: they differ",
    }


def test_a_contract_without_a_component_or_without_examples_says_so():
    class Empty(ExtractorContract):
        pass

    class NoExamples(ExtractorContract):
        component = Plain()

    assert "set `component`" in failures(Empty)["test_follows_its_spec"]
    with pytest.raises(AssertionError, match="NoExamples: set `documents`"):
        NoExamples().test_gives_the_text()
