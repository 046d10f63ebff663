"""Bundled readers, extractors, tokenizers and callbacks keep their contracts."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from nanovllm_readers.fields import Fields
from nanovllm_readers.json import Json, Jsonl
from nanovllm_readers.text import Txt
from nanovllm_tokenizers.bpe import Bpe
from nanovllm_tokenizers.hf import Hf

from nanovllm_core.callbacks.metrics import Metrics
from nanovllm_core.callbacks.progress import Progress
from nanovllm_core.contracts import ModelRef
from nanovllm_core.testing import CallbackContract, ExtractorContract, ReaderContract, TokenizerContract

TEXT = "één\r\nzwei\n\n漢字 \u2028 end"
VALUES = ["first", {"text": "één"}, 3, None, [1, {"deep": [True]}], {"input": "a", "output": "b"}]


class TestTxt(ReaderContract):
    component = Txt()
    files = {"a.txt": TEXT.encode(), "deep/B.TXT": b"\xef\xbb\xbfmarked", "blank.txt": b""} | {
        "wide.txt": "hello".encode("utf-16"),
        "a.txt.gz": gzip.compress(b"hello"),
    }
    records = {
        "a.txt": [TEXT],
        "deep/B.TXT": ["marked"],
        "blank.txt": [""],
        "wide.txt": ["hello"],
        "a.txt.gz": ["hello"],
    }
    refused = {"a.text": b"text", "txt": b"text", "a.gz": b"\x1f\x8b"}
    broken = {"bad.txt": b"ab\nc\xffd", "cut.txt.gz": gzip.compress(b"hello")[:-9]}


class TestTxtInLatin1(ReaderContract):
    component = Txt(encoding="latin-1")
    files = {"a.txt": "één".encode("latin-1")}
    records = {"a.txt": ["één"]}


class TestJson(ReaderContract):
    component = Json()
    files = {
        "array.json": json.dumps(VALUES, indent=1, ensure_ascii=False).encode(),
        "deep/one.json": b' {"text": "x"}\n',
        "none.json": b"[]",
    }
    records = {"array.json": VALUES, "deep/one.json": [{"text": "x"}], "none.json": []}
    refused = {"a.jsonl": b"{}", "json": b"{}"}
    broken = {
        "zero.json": b"[01]",
        "two.json": b"{} {}",
        "half.json": b"[1, 2",
        "bytes.json": b'["\xff"]',
        "nan.json": b"[NaN]",
    }


class TestJsonl(ReaderContract):
    component = Jsonl()
    files = {
        "a.jsonl": "\n".join(json.dumps(v, ensure_ascii=False) for v in VALUES).encode(),
        "deep/b.ndjson": b"\xef\xbb\xbf1\r\n\r\n 2\r\n",
        "none.jsonl": b"\n",
    }
    records = {"a.jsonl": VALUES, "deep/b.ndjson": [1, 2], "none.jsonl": []}
    refused = {"a.json": b"{}"}
    broken = {
        "cut.jsonl": b'{"a": 1}\n{"a": ',
        "two.jsonl": b"1 2\n",
        "bytes.jsonl": b'"\xff"\n',
        "deep.jsonl": b"[" * 9999,
    }


class TestFields(ExtractorContract):
    component = Fields()
    documents = [
        ("plain", "plain"),
        ({"text": "t", "content": "c"}, "t"),
        ({"text": " ", "content": "c", "body": "b"}, "c"),
        ({"input": "question", "output": "answer"}, "question\nanswer"),
        ({"title": "a", "n": 3, "more": "b"}, "a\nb"),
        ({"text": ""}, ""),
    ]
    wrong = [None, 3, True, [], ["a"], {}, {"n": 3}]


class TestFieldsRenamed(ExtractorContract):
    component = Fields(fields=("words",), prompt="q", answer="a", chat=False)
    documents = [({"words": "w", "text": "t"}, "w"), ({"q": "x", "a": "y"}, "x\ny")]


class TestBpe(TokenizerContract):
    component = Bpe()


class TestSmallestBpe(TokenizerContract):
    component = Bpe(size=258)


@pytest.fixture(scope="class")
def qwen3(request: pytest.FixtureRequest) -> None:
    root = os.environ.get("NANOVLLM_ASSETS")
    if not root:
        pytest.skip("NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)")
    request.cls.component = Hf(path=ModelRef(f"{root}/{request.cls.folder}"))


@pytest.mark.usefixtures("qwen3")
class TestHf(TokenizerContract):
    folder = "smollm2-135m"


class TestProgress(CallbackContract):
    component = Progress()


class TestMetrics(CallbackContract):
    component = Metrics()
