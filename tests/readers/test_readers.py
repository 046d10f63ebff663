"""Readers: what they accept, what they yield, and where they say a bad file is bad."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_readers.fields import Fields
from nanovllm_readers.json import Json, Jsonl
from nanovllm_readers.text import Txt

from nanovllm_core.contracts import Accept, Damage, Record, Refuse, Source
from nanovllm_core.errors import DataError
from nanovllm_core.hooks import bind, verify
from nanovllm_core.hookspecs import Extractors, Readers

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def source(path: Path) -> Source:
    return Source(path=str(path), name=path.name, size=path.stat().st_size)


def found(component: object, path: Path) -> list[Record | Damage]:
    return list(bind(Readers, [("reader", component)]).read(source=source(path)))


def records(component: object, path: Path) -> list[Record]:
    """As a strict run sees them."""
    result = []
    for record in bind(Readers, [("reader", component)]).read(source=source(path)):
        if isinstance(record, Damage):
            raise DataError(record.message)
        result.append(record)
    return result


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_components_follow_their_specs() -> None:
    for component in (Txt, Json, Jsonl):
        assert verify("readers", component) is None
    assert verify("extractors", Fields) is None
    assert bind(Extractors, [("fields", Fields())]).extract(record=Record(value="x", source="a")) is not None


@pytest.mark.parametrize(
    ("component", "yes", "no"),
    [
        (Txt(), ["a.txt", "b/C.TXT"], ["a.text", "txt", "a.json"]),
        (Json(), ["a.json", "A.JSON"], ["a.jsonl", "json"]),
        (Jsonl(), ["a.jsonl", "a.ndjson"], ["a.json", "a.txt"]),
    ],
)
def test_probe_goes_by_the_name(component: Txt | Json | Jsonl, yes: list[str], no: list[str]) -> None:
    assert all(isinstance(component.probe(Source(path=n, name=n)), Accept) for n in yes)
    assert all(isinstance(component.probe(Source(path=n, name=n)), Refuse) for n in no)
    assert isinstance(component.probe(Source(path=yes[0], name=yes[0], exists=False)), Refuse)


# ---------------------------------------------------------------- txt


def test_txt_is_one_record_with_its_characters_untouched(tmp_path: Path) -> None:
    text = "één\r\nzwei\n\n漢字 \u2028 end"
    assert records(Txt(), write(tmp_path, "a.txt", text)) == [Record(value=text, source="a.txt")]
    with_mark = records(Txt(), write(tmp_path, "b.txt", b"\xef\xbb\xbf" + text.encode()))
    assert [(r.value, r.byte) for r in with_mark] == [(text, 3)]
    assert [r.value for r in records(Txt(), write(tmp_path, "empty.txt", b""))] == [""]


def test_txt_other_encodings(tmp_path: Path) -> None:
    assert records(Txt(encoding="latin-1"), write(tmp_path, "a.txt", "é".encode("latin-1")))[0].value == "é"
    assert records(Txt(encoding="utf-16"), write(tmp_path, "b.txt", "é漢".encode("utf-16")))[0].value == "é漢"
    for wrong in ("nonsense", "hex", "rot13", 7):
        with pytest.raises(ValueError, match="expected a text encoding"):
            Txt(encoding=wrong)  # type: ignore[arg-type]


def test_txt_says_where_it_does_not_decode(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^a\.txt:2:4: not valid utf-8 .*latin-1"):
        records(Txt(), write(tmp_path, "a.txt", b"ab\nc\xffd"))
    with pytest.raises(DataError, match=r"^m\.txt:2:7: "):
        records(Txt(), write(tmp_path, "m.txt", b"\xef\xbb\xbfab\nc\xff"))


LATIN, CYRILLIC = "two words\nand more of them\n" * 9, "два слова\nи ещё\n" * 9
WITHOUT_A_MARK = [(text, codec) for text in (LATIN, CYRILLIC, "a", "ab") for codec in ("utf-16-le", "utf-16-be")]


@pytest.mark.parametrize(("text", "codec"), WITHOUT_A_MARK)
def test_txt_in_utf16_without_a_mark_is_refused_and_the_hint_reads_it(tmp_path: Path, text: str, codec: str) -> None:
    data = text.encode(codec)
    path = write(tmp_path, "a.txt", data)
    [damage] = found(Txt(), path)
    assert isinstance(damage, Damage)
    if text != CYRILLIC:  # some of its letters are no UTF-8
        assert (damage.byte, damage.line) == (data.index(0), 1 + data[: data.index(0)].count(10))
    assert damage.reason.startswith("a NUL character" if "ё" not in text else ("a NUL", "not valid utf-8"))
    assert "the file is probably UTF-16 without a byte order mark: save it as UTF-8, or set" in damage.reason
    [hint] = re.findall(r"`encoding: (\S+)` on the txt reader$", damage.reason)
    assert [r.value for r in records(Txt(encoding=hint), path)] == [text]


@pytest.mark.parametrize(
    ("data", "options", "line", "byte"),
    [
        (b"one\nt\0wo" + b" and text" * 9, {}, 2, 5),
        (b"\xef\xbb\xbfone\n" + b"text " * 500_000 + b"\n\0", {}, 3, 3 + 4 + 2_500_000 + 1),  # in a part of its own
        ("é漢\n\0x".encode("utf-16"), {}, 2, 8),
        ("é漢\n\0x".encode("utf-16"), {"encoding": "utf-16"}, 2, 8),
        ("é漢\n\0x".encode("utf-32-be"), {"encoding": "utf-32-be"}, 2, 12),
        ("éa\n\0x and text".encode("latin-1"), {"encoding": "latin-1"}, 2, 3),
        (b"one\n\0 text text \xff text", {}, 2, 4),  # before what is no UTF-8
        (bytes(range(256)) * 9, {"encoding": "latin-1"}, 1, 0),
    ],
)
def test_txt_says_where_a_nul_is(tmp_path: Path, data: bytes, options: dict[str, str], line: int, byte: int) -> None:
    [damage] = found(Txt(**options), write(tmp_path, "a.txt", data))
    assert isinstance(damage, Damage)
    assert (damage.line, damage.byte) == (line, byte)
    assert damage.reason.startswith("a NUL character, which no text holds; remove it")


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("words", ["text", "ä"])
def test_json_in_utf16_without_a_mark_is_named(tmp_path: Path, codec: str, words: str) -> None:
    lines = [f'{{"{words}": "{i}"}}' for i in range(3)]
    for component, name, text in (
        (Json(), "a.json", "[" + ",\n".join(lines) + "]"),
        (Json(), "b.json", lines[0]),
        (Jsonl(), "c.jsonl", "\n".join(lines)),
    ):
        data = text.encode(codec)
        damage = found(component, write(tmp_path, name, data))[0]
        assert isinstance(damage, Damage)
        assert (damage.line, damage.byte) == (1, data.index(0))
        assert damage.reason == (
            "a NUL character, which JSON does not allow; the file is probably UTF-16 without a byte order mark: save it as "
            "UTF-8"
        )


@pytest.mark.parametrize("content", ['["a\0b", 1]', "[1, \0 2]", '["a"]\0'])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_json_says_where_a_nul_is(tmp_path: Path, content: str, codec: str) -> None:
    for component, name in ((Json(), "a.json"), (Jsonl(), "a.jsonl")):
        *_, damage = (
            d for d in found(component, write(tmp_path, name, content.encode(codec))) if isinstance(d, Damage)
        )
        assert damage.byte == len(content[: content.index("\0")].encode(codec))
        assert damage.reason.startswith("a NUL character, which JSON does not allow; remove it")


# ---------------------------------------------------------------- json, jsonl


@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON, max_size=5), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_json_array_gives_back_its_elements_and_their_bytes(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("j") / "a.json"
    data = b"\xef\xbb\xbf" * ascii_only + json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8")
    path.write_bytes(data)
    found = records(Json(), path)
    assert [(r.value, r.index, r.line) for r in found] == [(v, i, None) for i, v in enumerate(values)]
    for record in found:  # the byte is where the value stands in the file
        value, _ = json.JSONDecoder().raw_decode(data[record.byte :].decode("utf-8"))
        assert value == record.value


@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON, max_size=5), end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]), last=st.booleans())
def test_jsonl_gives_back_its_lines_and_their_bytes(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], end: str, last: bool
) -> None:
    path = tmp_path_factory.mktemp("l") / "a.jsonl"
    data = (end.join(json.dumps(v, ensure_ascii=False) for v in values) + end * last).encode("utf-8")
    path.write_bytes(data)
    found = records(Jsonl(), path)
    assert [(r.value, r.index) for r in found] == [(v, i) for i, v in enumerate(values)]
    for record in found:
        assert data.count(b"\n", 0, record.byte) + 1 == record.line
        assert json.loads(data[record.byte :].split(b"\n")[0]) == record.value


def test_json_single_values(tmp_path: Path) -> None:
    assert [r.value for r in records(Json(), write(tmp_path, "a.json", ' {"text": "x"}\n'))] == [{"text": "x"}]
    assert [r.value for r in records(Json(), write(tmp_path, "b.json", '"x"'))] == ["x"]
    assert records(Json(), write(tmp_path, "c.json", " [ ] ")) == []
    assert records(Jsonl(), write(tmp_path, "d.jsonl", "\n \n")) == []


BAD = [
    ('{"a": NaN}', 6, "NaN is not JSON"),
    ('{"a": [1, -Infinity]}', 10, "-Infinity is not JSON"),
    ('{"é": 1, "b": {"é": 2}, "é": 3}', 26, "the key 'é' is given twice"),
    ('{"a": "x\\ud800y"}', 6, "half of a surrogate pair"),
    ('{"\\udfff": 1}', 1, "half of a surrogate pair"),
    ("[" * 64 + "[" + "]" * 65, 64, "deeper than 64"),
    ('{"a":' * 5000, 5 * 64, "deeper than 64"),
    ("[" * 200_000, 64, "deeper than 64"),
    ('{"a": ' + "9" * 5000 + "}", 6, "an integer of 5,000 digits"),
    ('{"a": 01}', 7, "a number may not begin with 0"),
    ("[-012]", 3, "a number may not begin with 0"),
    ("012", 1, "a number may not begin with 0"),
    ("[1.]", 2, "a number may not go on with '.'"),
    ("[0x1F]", 2, "a number may not go on with 'x'"),
    ("[1_000]", 2, "a number may not go on with '_'"),
    ("[+1]", 1, "expecting a value, found '+1'; a number begins with a digit, or with - and a digit"),
    ("[.5]", 1, "expecting a value, found '.5'; a number begins with a digit, or with - and a digit"),
    ('{"a": "x\ty"}', 8, "a control character within a string, where it must be written as \\n"),
    ('{"a": "x', 6, "a string begins here and does not end"),
    ('{"a": "\\x"}', 7, "a backslash within a string that begins no escape"),
    ('{"a": "\\u12"}', 8, "\\u within a string without four hexadecimal digits behind it"),
    ("{'a': 1}", 1, "expecting a key in double quotes, found a single quote; strings stand in double quotes"),
    ('{"a": 1, }', 9, "expecting a key in double quotes, found '}'; no comma may stand before it"),
    ('{"a": [1,\t]}', 10, "expecting a value, found ']'; no comma may stand before it"),
    ('{"a" 1}', 5, "expecting ':' behind a key"),
    ('{"a": 1 "b": 2}', 8, "expecting ',' or the end of the array or object, found '\"'"),
    ('{"a": 1} x', 9, "more follows after"),
    ("nope", 0, "expecting a value, found 'nope'"),
    ('{"a": None}', 6, "expecting a value, found None; JSON writes null"),
    ("[undefined_and_more_of_it]", 1, "expecting a value, found 'undefined_an...'"),
]


@pytest.mark.parametrize(("text", "byte", "reason"), BAD, ids=[b[2] + b[0][:6] for b in BAD])
def test_json_refuses_with_the_exact_place(tmp_path: Path, text: str, byte: int, reason: str) -> None:
    with pytest.raises(DataError) as e:
        records(Jsonl(), write(tmp_path, "a.jsonl", '{"text": "ok"}\n' + text + "\n"))
    assert str(e.value).startswith(f"a.jsonl:2:{15 + byte}: ")
    assert reason in str(e.value)
    head = '[{"text": "ö"},\n'  # 16 characters, 17 bytes
    if not text.startswith("[[") and "does not end" not in reason:  # these swallow what follows
        with pytest.raises(DataError) as e:
            records(Json(), write(tmp_path, "a.json", head + text + "\n]"))
        found = re.match(r"a\.json:(\d+):(\d+): ", str(e.value))
        assert found
        assert int(found[1]) >= 2
        assert int(found[2]) >= 17 + byte if "more follows" in reason else int(found[2]) == 17 + byte


def test_json_depth_64_and_pairs_of_surrogates_are_fine(tmp_path: Path) -> None:
    deep = "[" * 64 + "]" * 64
    assert len(records(Jsonl(), write(tmp_path, "a.jsonl", deep))) == 1
    wide = json.dumps({"a": [[]] * 500})
    assert len(records(Jsonl(), write(tmp_path, "b.jsonl", wide))) == 1
    assert records(Jsonl(), write(tmp_path, "c.jsonl", '["\\ud83d\\ude00 \\\\ud800"]'))[0].value == ["😀 \\ud800"]


def test_json_other_refusals(tmp_path: Path) -> None:
    for name, data, start in [
        ("a.json", b'{"a": "\xff"}', "a.json:1:7: not valid utf-8"),
        ("b.json", b'[1,\n "\xc3"]', "b.json:2:6: not valid utf-8"),
        ("c.json", b'[1, "a', "c.json:1:4: a string begins here and does not end"),
        ("d.json", b'{"a":1}\n{"a":2}\n', "d.json:2:8: more follows"),
        ("e.json", b"[1 2]", "e.json:1:3: expecting ',' or ']'"),
        ("f.json", b"[1,]", "f.json:1:3: expecting a value, found ']'; no comma may stand before it"),
        ("j.json", b"[1,\n 02]", "j.json:2:6: a number may not begin with 0"),
        ("k.json", b"[1, 2.x]", "k.json:1:5: a number may not go on with '.'"),
        ("l.json", b"02", "l.json:1:1: a number may not begin with 0"),
        ("m.json", b"[1, ", "m.json:1:4: expecting a value; the text ends here"),
        ("n.json", b'[1, {"a": 2', "n.json:1:11: expecting ',' or the end of the array or object; the text ends here"),
        ("g.json", b"[1] [2]", "g.json:1:4: more follows"),
        ("h.json", b"[1", "h.json:1:2: expecting ',' or ']'"),
    ]:
        with pytest.raises(DataError) as e:
            records(Json(), write(tmp_path, name, data))
        assert str(e.value).startswith(start), str(e.value)
    with pytest.raises(DataError, match=r"^i\.jsonl:2:11: not valid utf-8"):
        records(Jsonl(), write(tmp_path, "i.jsonl", b'{"a":1}\n["\xc3\xa9\xff"]'.replace(b"\xc3\xa9", b"x")))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60) | TEXT.map(str.encode) | JSON.map(lambda v: json.dumps(v)[:-1].encode()))
def test_readers_never_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("x")
    for component, name in ((Txt(), "a.txt"), (Json(), "a.json"), (Jsonl(), "a.jsonl")):
        message = ""
        try:
            records(component, write(folder, name, data))
        except DataError as e:
            message = str(e)
        assert not message or re.match(rf"{name}:\d+:\d+: ", message)
