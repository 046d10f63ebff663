"""Compressed files, encodings, and files larger than memory is allowed to grow."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_readers import text as text_module
from nanovllm_readers import window as window_module
from nanovllm_readers.json import Json, Jsonl
from nanovllm_readers.text import Txt

from nanovllm_core.contracts import Accept, Damage, Source

PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}
VALUES = [{"text": "één\u2028 zwei"}, "漢字 😀", 3, None, ["a\nb", {"x": -1.5e3}]]
ENCODINGS = {
    "utf-8": "utf-8",
    "utf-8-sig": "utf-8",
    "utf-16-le": "utf-16-le",
    "utf-16-be": "utf-16-be",
    "utf-32-le": "utf-32-le",
}


def encoded(text: str, encoding: str) -> bytes:
    mark = "\ufeff" if encoding not in ("utf-8", "utf-8-sig") else ""
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_format_in_every_encoding_packed_or_not(tmp_path, read, packed: str, encoding: str, end: str) -> None:
    lines = end.join(json.dumps(v, ensure_ascii=False) for v in VALUES) + end
    array = "[" + ("," + end).join(json.dumps(v, ensure_ascii=False) for v in VALUES) + "]"
    for reader, name, text, expected in (
        (Txt(), "a.TXT", lines, [lines]),
        (Json(), "a.json", array, VALUES),
        (Jsonl(), "a.ndjson", lines, VALUES),
    ):
        content = encoded(text, encoding)
        path = tmp_path / (name + packed)
        path.write_bytes(PACK[packed](content))
        assert isinstance(reader.probe(Source(path=str(path), name=path.name)), Accept)
        found = read(reader, path)
        assert [r.value for r in found] == expected
        for record in found[1:]:  # the place is in what is packed
            rest = content[record.byte :].decode(ENCODINGS[encoding])
            assert json.JSONDecoder().raw_decode(rest)[0] == record.value


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_place_of_damage_is_exact_in_every_encoding(tmp_path, read, encoding: str) -> None:
    codec = ENCODINGS[encoding]
    start = len(encoded("", encoding))
    bad = '["é",\n {"ö": NaN}, 1]'
    path = tmp_path / "a.json"
    path.write_bytes(encoded(bad, encoding))
    _, damage, one = read(Json(), path)
    assert (damage.line, damage.byte, damage.index) == (2, start + len(bad[: bad.index("NaN")].encode(codec)), 1)
    assert (one.value, one.index) == (1, 2)
    bad = '"é"\n\n{"ö": NaN}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded(bad, encoding))
    _, damage = read(Jsonl(), path)
    assert (damage.line, damage.byte, damage.index) == (3, start + len(bad[: bad.index("NaN")].encode(codec)), 1)


NO_TEXT = {  # in UTF-8, UTF-16, UTF-32: what is none, between characters that are
    "utf-8": [b"\xff", b"\xc3", b"\xe6\xbc", b"\xed\xa0\x80", b"\xc0\xaf", b"\x80\x80"],
    "utf-16-le": [b"\x00\xd8", b"\x00\xdc"],
    "utf-16-be": [b"\xd8\x00", b"\xdc\x00"],
    "utf-32-le": [b"\x00\xd8\x00\x00", b"\xff\xdf\x00\x00"],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from('aé漢😀\n"\\]},'), max_size=5), min_size=1, max_size=6),
    piece=st.integers(1, 40),
    data=st.data(),
)
def test_bytes_that_are_no_text_damage_their_record_alone(
    tmp_path_factory, read, encoding: str, texts: list[str], piece: int, data: st.DataObject
) -> None:
    codec = ENCODINGS[encoding]
    content, expected, mark = encoded("[", encoding), [], "Ö"
    for index, text in enumerate(texts):
        content += ",\n".encode(codec) * bool(index)
        parts = json.dumps({"a": 1, "text": f"x{mark}-{text}{mark}y"}, ensure_ascii=False).split(mark)
        for number, part in enumerate(parts):
            content += part.encode(codec)
            if number < 2 and data.draw(st.booleans()):
                if len(expected) == index:
                    expected.append((content.count("\n".encode(codec)) + 1, len(content)))
                content += data.draw(st.sampled_from(NO_TEXT[codec]))
        if len(expected) == index:
            expected.append({"a": 1, "text": f"x-{text}y"})
    path = tmp_path_factory.mktemp("n") / "a.json"
    path.write_bytes(content + "]".encode(codec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "PIECE", piece)
        found = read(Json(), path)
    assert [(r.line, r.byte) if isinstance(r, Damage) else r.value for r in found] == expected
    assert [r.index for r in found] == list(range(len(texts)))
    assert all(r.reason.startswith(f"not valid {codec} (") and not r.last for r in found if isinstance(r, Damage))


@pytest.mark.parametrize(
    ("content", "byte", "rest"),
    [
        (b"[1, \xff 2, 3]", 4, [3]),  # between records, and in the middle of words, numbers and keys
        (b"[1, nu\xffll, 3]", 6, [3]),
        (b"[1, 2\xff, 3]", 5, None),  # the record before is whole: what follows it is no comma
        (b'[1, {"\xff": 2, "\xff": NaN}, 3]', 6, [3]),
        (b'[1, {"a": [2, "\xff"}, 3]', 15, None),  # its brackets are not in order
        (b'[1, {"a": NaN, "b": "\xff"}, 3]', 10, [3]),  # NaN is wrong before it
        (b"\xff[1]", 0, None),
    ],
)
def test_bytes_that_are_no_text_outside_of_strings(tmp_path, read, content: bytes, byte: int, rest) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    found = read(Json(), path)
    [damage] = [r for r in found if isinstance(r, Damage)]
    assert damage.byte == byte
    assert damage.last == (rest is None)
    assert damage.reason.startswith("NaN" if byte == 10 else "not valid utf-8")
    assert [r.value for r in found[found.index(damage) + 1 :]] == (rest or [])


@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"\xff\xfe" + "a\nb".encode("utf-16-le") + b"\x00\xd8x\x00", 2, 8),  # half of a pair
        (b"\xff\xfe" + "ab".encode("utf-16-le") + b"c", 1, 6),  # half of a unit
        (b"\xef\xbb\xbfab\n\xc3", 2, 6),
    ],
)
def test_what_is_no_text_has_its_place(tmp_path, read, data: bytes, line: int, byte: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    [damage] = read(Txt(), path)
    assert (damage.line, damage.byte, damage.last, damage.only, damage.begins) == (line, byte, True, True, 0)
    assert damage.reason.startswith("not valid utf-")
    assert [(d.line, d.byte, d.last) for d in read(Json(), path)][-1][2]


# ---------------------------------------------------------------- compressed


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_members_one_after_another_are_one_file(tmp_path, read, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(b"".join(PACK[packed](part) for part in (b"one ", b"", b"two ", b"three")))
    assert [r.value for r in read(Txt(), path)] == ["one two three"]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_compressed_file_goes_unseen(tmp_path_factory, read, packed: str, data: st.DataObject) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(400))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    whole = gzip.compress(text.encode()) if packed == ".gz" else compressor.compress(text.encode())
    cut = data.draw(st.integers(1, len(whole) - 1))  # an empty file is one without content
    broken = whole[:cut]
    if data.draw(st.booleans()):
        broken = whole[:cut] + bytes([whole[cut] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[cut + 1 :]
    path = tmp_path_factory.mktemp("z") / f"a.txt{packed}"
    path.write_bytes(broken)
    [found] = read(Txt(), path)
    if isinstance(found, Damage):
        assert found.message.startswith(f"a.txt{packed}: the compressed data is damaged or cut off near byte ")
        assert (found.last, found.only, found.begins) == (True, True, 0)
    else:
        assert found.value == text, "unseen"  # gzip's header has bits without a meaning


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_file_of_any_kind_is_no_damage(tmp_path, read, packed: str, content: bytes | None) -> None:
    for reader, name in ((Txt(), "a.txt"), (Json(), "a.json"), (Jsonl(), "a.jsonl")):
        path = tmp_path / f"{name}{packed}"
        path.write_bytes(b"" if content is None else PACK[packed](content))
        blank = content if content == b" \n" else b""
        assert [r.value for r in read(reader, path)] == ([blank.decode()] if name == "a.txt" else [])


# ---------------------------------------------------------------- large


def test_a_long_text_comes_in_parts(tmp_path, read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PART", 1000)
    text = "één zwei 漢字 😀\r\n" * 300
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    found = read(Txt(), path)
    assert len(found) == -(-len(text.encode()) // 1000)
    assert "".join(r.value for r in found) == text
    assert [r.continues for r in found] == [True] * (len(found) - 1) + [False]
    assert all(text.encode()[r.byte :].startswith(r.value.encode()) for r in found)
    path.write_bytes(text.encode() + b"\xff")
    [damage] = Txt().read(Source(path=str(path), name="a.txt"))  # before any part is given
    assert isinstance(damage, Damage)
    assert damage.line == 301


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(VALUE, max_size=6),
    piece=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_a_window_of_any_size_gives_what_the_json_module_gives(
    tmp_path_factory, read, values: list[object], piece: int, ascii_only: bool, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("w") / "a.json"
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "PIECE", piece)
        found = read(Json(), path)
    assert [r.value for r in found] == json.loads(text)
    for record in found:
        assert json.JSONDecoder().raw_decode(text[record.byte :].decode())[0] == record.value


def test_a_word_that_begins_as_a_constant_is_placed_in_a_window_of_any_size(tmp_path, read, monkeypatch) -> None:
    (tmp_path / "a.json").write_text("[[null, 0.0,NaNnull]]")
    for piece in (1 << 18, *range(1, 22)):
        monkeypatch.setattr(window_module, "PIECE", piece)
        (damage,) = read(Json(), tmp_path / "a.json")
        assert (damage.reason, damage.byte) == ("NaN is not JSON", 12)


@settings(max_examples=400, deadline=None)
@given(values=st.lists(VALUE, min_size=1, max_size=4), piece=st.integers(1, 40), data=st.data())
def test_damage_is_the_same_in_a_window_of_any_size(
    tmp_path_factory, read, values: list[object], piece: int, data: st.DataObject
) -> None:
    text = json.dumps(values, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)))
    text = (
        text[:at]
        + data.draw(st.sampled_from(["", '"', "{", "]", ",", "NaN", "\\", "0", "\n", "'", ":"]))
        + text[at + 1 :]
    )
    path = tmp_path_factory.mktemp("w") / "a.json"
    path.write_bytes(text.encode("utf-8", "replace"))
    whole = read(Json(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "PIECE", piece)
        assert read(Json(), path) == whole


def test_a_record_longer_than_allowed_is_damage_and_the_next_one_is_read(tmp_path, read) -> None:
    rows = ['{"text": "short"}', json.dumps({"text": "x" * 5_000_000}), '"after"']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "]")
    for reader, name in ((Jsonl(max_record=1_000_000), "a.jsonl"), (Json(max_record=1_000_000), "a.json")):
        first, damage, last = read(reader, tmp_path / name)
        assert (first.value, last.value) == ({"text": "short"}, "after")
        assert "`max_record` on the json" in damage.reason
        assert (damage.line, damage.index, last.index) == (2, 1, 2)


SCRIPT = """
import sys
sys.path[:] = {path!r}
import resource
from nanovllm_core.contracts import Source
from nanovllm_readers.json import Json, Jsonl
from nanovllm_readers.text import Txt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in {reader}().read(Source(path={file!r}, name={file!r})))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(os.name == "nt", reason="resource is not there on Windows")
@pytest.mark.parametrize("name", ["a.json", "a.json.zst", "a.jsonl.gz", "a.txt"])
def test_files_larger_than_what_memory_grows_by(tmp_path: Path, name: str) -> None:
    reader = name.split(".")[1].title()
    row = json.dumps({"text": "some words in a record " * 40})
    text = {
        "Json": "[" + ", ".join([row] * 100_000) + "]",
        "Jsonl": (row + "\n") * 100_000,
        "Txt": "words and " * 10_000_000,
    }
    path = tmp_path / name
    packed = path.suffix if path.suffix in PACK else ""
    data = text[reader].encode()
    path.write_bytes(gzip.compress(data, 1) if packed == ".gz" else PACK[packed](data))
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(path=sys.path, reader=reader, file=str(path))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    count, grown = map(int, out.split())
    assert count == (96 if reader == "Txt" else 100_000)
    assert grown < 40, f"{grown} MB for {len(data) >> 20} MB in one {'array' if reader == 'Json' else 'file'}"
