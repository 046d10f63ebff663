"""What `nanovllm analyze` tells of a folder, against figures counted by hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from nanovllm_tokenizers.bpe import train

from nanovllm_core.analyze import analyze_document_collection, table
from nanovllm_core.errors import DataError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "documents"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one two three")
    (root / "b.txt").write_bytes("ä ö".encode("utf-16"))
    (root / "sub" / "c.jsonl").write_text('{"text": "one two three"}\n{"text": NaN}\n{"text": ""}\n"four"\n')
    (root / "sub" / "d.json.gz").write_bytes(gzip.compress(b'["four", "four", 7]'))
    (root / "e.txt").write_bytes(b"\xff\xfd")
    (root / "empty.json").write_text("[]")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def test_figures(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    found = analyze_document_collection(folder, progress=lambda done, total: told.append((done, total)))
    assert json.loads(json.dumps(found)) == found
    assert (found["total_documents"], found["total_characters"], found["total_words"]) == (6, 13 + 3 + 13 + 12, 11)
    assert found["total_bytes"] == found["total_characters"] + 2
    assert found["file_types"] == {".txt": 3, ".jsonl": 1, ".json.gz": 1, ".json": 1, ".png": 1}
    assert found["files"] == [
        {"path": "a.txt", "documents": 1, "characters": 13, "avg_length": 13.0},
        {"path": "b.txt", "documents": 1, "characters": 3, "avg_length": 3.0},
        {"path": "e.txt", "documents": 0, "characters": 0, "avg_length": 0.0},
        {"path": "empty.json", "documents": 0, "characters": 0, "avg_length": 0.0},
        {"path": "sub/c.jsonl", "documents": 2, "characters": 17, "avg_length": 8.5},
        {"path": "sub/d.json.gz", "documents": 2, "characters": 8, "avg_length": 4.0},
    ]
    assert found["encodings"] == {"ascii": 4, "utf-16-le with a byte order mark": 1, "no UTF-8": 1}
    assert found["duplicates"] == {
        "documents": 3,
        "groups": [
            {"copies": 3, "documents": ["sub/c.jsonl[3]", "sub/d.json.gz[0]", "sub/d.json.gz[1]"]},
            {"copies": 2, "documents": ["a.txt[0]", "sub/c.jsonl[0]"]},
        ],
    }
    assert found["skipped"] == {"unreadable file, or the rest of it": 1, "broken record": 2, "empty": 2}
    assert [(r["source"], r["line"], r["index"]) for r in found["skipped_records"]] == [
        ("e.txt", 1, 0),
        ("empty.json", None, 0),
        ("sub/c.jsonl", 2, 1),
        ("sub/c.jsonl", 3, 2),
        ("sub/d.json.gz", None, 2),
    ]
    size = sum(f.stat().st_size for f in folder.rglob("*.*") if f.suffix != ".png")
    assert (found["loss"]["bytes"], found["loss"]["of"], found["loss"]["of_compressed"]) == (2, size, 0)
    assert found["left_out"] == ["1 files of kind .png are left out: no reader takes them"]
    assert found["tokens"] is None
    assert told[-1][0] == told[-1][1]
    text = table(found)
    for part in (
        "6 documents in 6 files",
        "NaN is not JSON",
        "3 exact copies, in 2 groups",
        "e.txt:1:0: not valid utf-8",
        f"lost         2 of {size} bytes, with unreadable files",
    ):
        assert part in text


def test_utf_16_without_a_mark_and_nuls_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good text")
    (tmp_path / "b.txt").write_bytes("some words".encode("utf-16-be"))
    (tmp_path / "c.txt").write_bytes(b"some text \0 and more of it")
    (tmp_path / "d.jsonl").write_bytes('{"text": "some words"}'.encode("utf-16-le"))
    found = analyze_document_collection(tmp_path)
    assert found["encodings"] == {
        "ascii": 1,
        "probably utf-16-be without a byte order mark": 1,
        "no text: it has NUL characters": 1,
        "probably utf-16-le without a byte order mark": 1,
    }
    assert found["skipped"] == {"unreadable file, or the rest of it": 2, "broken record": 1}
    text = table(found)
    for place in ("b.txt:1:0", "c.txt:1:10", "d.jsonl:1:1"):
        assert f"{place}: a NUL character, which" in text
    assert text.count("probably UTF-16 without a byte order mark") == 2


def test_tokens_and_what_is_suggested(folder: Path, tmp_path: Path) -> None:
    tokenizer = train(["one two three four " * 50], 300)
    tokenizer.save(tmp_path / "tokenizer")
    texts = ["one two three", "ä ö", "one two three", "four", "four", "four"]
    (folder / "long.txt").write_text("four one " * 5000)
    lengths = sorted(2 + len(ids) for ids in tokenizer.encode([*texts, "four one " * 5000]))
    for given in (tokenizer, tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        tokens = analyze_document_collection(folder, given)["tokens"]
        assert tokens["total"] == sum(lengths)
        assert (tokens["percentiles"]["100"], tokens["percentiles"]["5"]) == (lengths[-1], lengths[0])
    found = analyze_document_collection(folder, tokenizer)
    suggested = {key: item["value"] for key, item in found["suggested"].items()}
    assert suggested == {"max_seq_length": 128, "chunk_overlap": 32, "min_chunk_size": 32}
    assert "1 documents are cut" in found["suggested"]["chunk_overlap"]["why"]
    (folder / "long.txt").unlink()
    assert analyze_document_collection(folder)["suggested"]["chunk_overlap"]["value"] == 0


def test_a_folder_without_documents_is_an_answer_and_no_folder_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    found = analyze_document_collection(tmp_path)
    assert (found["total_documents"], found["files"], found["suggested"]) == (0, [], {})
    assert "0 documents in 0 files" in table(found)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        analyze_document_collection(tmp_path / "nowhere")
    with pytest.raises(ModelError):
        analyze_document_collection(tmp_path, tmp_path / "no tokenizer")


def test_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "nanovllm_core.cli", "analyze"]
    text = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert text.stdout.startswith(f"{folder}: 6 documents in 6 files\n")
    assert text.stderr == ""
    told = subprocess.run([*command, str(folder), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == analyze_document_collection(folder)
    wrong = subprocess.run([*command, str(folder / "nowhere")], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Traceback" not in wrong.stderr


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = f"import sys; from nanovllm_core.analyze import analyze_document_collection as a; a({str(folder)!r}); " \
           "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
