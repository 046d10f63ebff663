"""Writes the guide's keys into guide.md, from the code: `python docs/keys.py` after a change of `guide/keys.py` or the recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nanovllm_core.guide.keys import TABLE
from nanovllm_core.options import type_text

PAGE = Path(__file__).with_name("guide.md")
BEGIN, END = "<!-- keys: written by docs/keys.py -->", "<!-- end of keys -->"


def rendered() -> str:
    """The part of the page between the marks."""
    lines = ["| key | in a recipe | type | default | |", "| --- | --- | --- | --- | --- |"]
    for key, meaning in TABLE.items():
        default = json.dumps(meaning.default, ensure_ascii=False)
        kind = type_text(meaning.type).replace("|", "\\|")
        lines.append(f"| `{key}` | `{meaning.recipe}` | {kind} | `{default}` | {meaning.help} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with the part written anew."""
    found = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{rendered()}\n{END}", page, flags=re.DOTALL)
    if BEGIN not in found:
        raise SystemExit(f"{PAGE}: has no {BEGIN}")
    return found


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
