"""The readers and the extractor, by nano-vllm's conformance kit."""

import codecs

from nanovllm_markdown.plain import Plain
from nanovllm_markdown.readers import Markdown
from nanovllm_markdown.table import Csv

from nanovllm_core.testing import ExtractorContract, ReaderContract

PAGE = "---\ntitle: Mills\n---\n# The *old* mill\n\nIt ground [rye](https://example.org) — and `wheat`.\n"


class TestMarkdown(ReaderContract):
    component = Markdown()
    files = {
        "page.md": PAGE.encode(),
        "deep/er/OTHER.MARKDOWN": b"one\r\ntwo",
        "marked.md": codecs.BOM_UTF8 + b"# Hi",
        "empty.md": b"",
    }
    records = {
        "page.md": [{"markdown": PAGE}],
        "deep/er/OTHER.MARKDOWN": [{"markdown": "one\r\ntwo"}],
        "marked.md": [{"markdown": "# Hi"}],
        "empty.md": [{"markdown": ""}],
    }
    refused = {"notes.txt": b"# Hi", "md": b"# Hi", "page.md.png": b"\x89PNG"}
    broken = {"bad.md": b"good\n\xff"}


class TestCsv(ReaderContract):
    component = Csv()
    files = {
        "people.csv": b'name,text\nAda,"wrote, in 1843,\nthe ""first"" program"\n\nGrace,found a moth\n',
        "windows.CSV": codecs.BOM_UTF8 + "text,täg\r\nyes,\r\n".encode(),
        "header.csv": b"a,b\n",
        "empty.csv": b"",
    }
    records = {
        "people.csv": [
            {"name": "Ada", "text": 'wrote, in 1843,\nthe "first" program'},
            {"name": "Grace", "text": "found a moth"},
        ],
        "windows.CSV": [{"text": "yes", "täg": ""}],
        "header.csv": [],
        "empty.csv": [],
    }
    refused = {"table.tsv": b"a\tb\n", "csv": b"a,b\n"}
    broken = {
        "short.csv": b"a,b\n1\n",
        "long.csv": b"a,b\n1,2,3\n",
        "twice.csv": b"a,a\n1,2\n",
        "open.csv": b'a,b\n1,"2\n',
        "latin.csv": "a\nMüller\n".encode("latin-1"),
        "huge.csv": b"a\n" + b"x" * 140_000,
    }


class TestSemicolons(ReaderContract):
    component = Csv(delimiter=";")
    files = {"a.csv": b"text;n\none, two;1\n"}
    records = {"a.csv": [{"text": "one, two", "n": "1"}]}


class TestPlain(ExtractorContract):
    component = Plain()
    documents = (
        ({"markdown": PAGE}, "The old mill\n\nIt ground rye — and wheat.\n"),
        ({"markdown": ""}, ""),
    )
    passed_on = ("text", {"text": "a"}, ["markdown"], None, 3)
    wrong = ({"markdown": 3}, {"markdown": None})
