"""Markdown to the text that a reader sees: the signs that format it go, its words and its code stay.

Line by line, with regular expressions: no full CommonMark parser, and none is needed to train on prose. What is not
understood (tables, HTML, footnotes) stays as it was written. Nothing inside code is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from attrs import frozen

from nanovllm_core.contracts import Document, Record, Segment
from nanovllm_core.errors import DataError
from nanovllm_core.hookspecs import hookimpl

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+|$)(.*?)(?:[ \t]+#+)?[ \t]*$")
QUOTE = re.compile(r"(?: {0,3}>[ \t]?)+")
UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*$")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
IMAGE_OR_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*(?:[ \t]+\"[^\"]*\")?\)")
STRONG = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
EMPHASIS = re.compile(
    r"(?<![\w*])(\*)(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w*])|(?<!\w)(_)(?=[^\s_])(.+?)(?<=[^\s_])\3(?!\w)"
)


@frozen(kw_only=True, eq=False)
class Plain:
    """Markdown records as plain text; other records are left to the next extractor.

    code: keep fenced code blocks (without their fences)
    """

    code: bool = True

    @hookimpl
    def extract(self, record: Record) -> Document | None:
        """The document of a record `{"markdown": text}`. Raises DataError when that is no string."""
        value = record.value
        if not isinstance(value, dict) or "markdown" not in value:
            return None
        if not isinstance(value["markdown"], str):
            raise DataError(f"{record.place}: `markdown` is a {type(value['markdown']).__name__}, expected a string")
        segment = Segment(plain(value["markdown"], code=self.code))
        return Document(segments=(segment,), source=record.source, index=record.index)


def plain(text: str, *, code: bool = True) -> str:
    """Markdown as plain text; front matter and comments go."""
    lines = "".join(_lines(text.splitlines(keepends=True), code)).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", lines) + "\n" if lines else ""


def _lines(lines: list[str], code: bool) -> Iterator[str]:
    prose: list[str] = []
    fence = ""
    for line in lines[_front_matter(lines) :]:
        found = FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
            elif code:
                yield line
        elif found and "`" not in found[2]:
            yield from _prose(prose)
            prose, fence = [], found[1]
        else:
            prose.append(line)
    yield from _prose(prose)


def _front_matter(lines: list[str]) -> int:
    """How many lines the YAML between two `---` at the beginning takes."""
    if lines and lines[0].rstrip() == "---":
        for i, line in enumerate(lines[1:], 2):
            if line.rstrip() in ("---", "..."):
                return i
    return 0


def _prose(lines: list[str]) -> Iterator[str]:
    before = ""
    for line in COMMENT.sub("", "".join(lines)).splitlines(keepends=True):
        body = line.rstrip("\r\n")
        end = line[len(body) :]
        if UNDERLINE.match(body) and before.strip():
            before = ""  # the line before is a heading, and this what marks it as one
            continue
        before = body
        body = QUOTE.sub("", body, count=1) if QUOTE.match(body) else body
        body = found[1] if (found := HEADING.match(body)) else body
        yield _inline(body) + end


def _inline(text: str) -> str:
    parts, at = [], 0
    for found in CODE.finditer(text):
        parts += [_unmarked(text[at : found.start()]), found[2]]
        at = found.end()
    return "".join([*parts, _unmarked(text[at:])])


def _unmarked(text: str) -> str:
    text = IMAGE_OR_LINK.sub(r"\1", IMAGE_OR_LINK.sub(r"\1", text))  # twice: an image may stand in a link
    text = STRONG.sub(r"\2", text)
    return EMPHASIS.sub(lambda m: m[2] or m[4], text)
