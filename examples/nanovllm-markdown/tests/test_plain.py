"""What becomes of Markdown, construct by construct; and where a bad row stands."""

import pytest
from nanovllm_markdown.plain import plain
from nanovllm_markdown.table import Csv

from nanovllm_core.contracts import Source
from nanovllm_core.errors import DataError


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("# One #\n## *Two*\n####### seven\n", "One\nTwo\n####### seven\n"),
        ("Title\n=====\ntext\n\n---\n", "Title\ntext\n\n---\n"),
        ("**bold** __too__ *it* _too_ ***both***", "bold too it too both\n"),
        ("snake_case_name and 2 * 3 * 4 and a*b", "snake_case_name and 2 * 3 * 4 and a*b\n"),
        ('[a](b) ![pic](c.png) [![in](d)](e "t") [not] (this)', "a pic in [not] (this)\n"),
        ("`*code*` and ``a ` b`` *not*", "*code* and a ` b not\n"),
        ("> said\n> > he\n", "said\nhe\n"),
        ("- one\n- *two*\n", "- one\n- two\n"),
        ("a<!-- one\n# two -->b", "ab\n"),
        ("```python\n# *kept*\n```\n*gone*", "# *kept*\ngone\n"),
        ("~~~\n```\n~~~~\nafter *it*", "```\nafter it\n"),
        ("```\nnever closed\n# *so* kept", "```\nnever closed\n# *so* kept\n".removeprefix("```\n")),
        ("---\na: 1\n---\nbody", "body\n"),
        ("---\nnot closed, so no front matter", "---\nnot closed, so no front matter\n"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo\n"),
    ],
)
def test_plain(markdown, text):
    assert plain(markdown) == text


def test_code_can_be_left_out():
    assert plain("before\n```\ncode\n```\nafter `inline`", code=False) == "before\nafter inline\n"


def test_a_bad_row_is_told_by_line_and_byte(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('text,n\n"two\nlines ä",1\n\nshort\n'.encode())
    rows = Csv().read(Source(path=str(path), name="a.csv", size=path.stat().st_size))
    first = next(rows)
    assert (first.line, first.byte, first.index) == (2, 7, 0)
    with pytest.raises(DataError, match=r"a\.csv:5:\d+: the row has 1 cells, the header 2 \(text, n\)"):
        next(rows)
