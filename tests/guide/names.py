"""Every name, argument, key, flag and field of the guide, and the blocks that use it: `python tests/guide/names.py` writes it.

Taken from the blocks themselves (Python by its syntax tree, JSON by its keys, shell by its flags) and from the words that the
text sets in code. What stands in the text alone is proved by a test instead (`TESTS`).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "names.md"

spec = importlib.util.spec_from_file_location("blocks", HERE / "blocks.py")
assert spec is not None
assert spec.loader is not None
blocks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blocks)

THEIRS = {"backward", "step", "zero_grad"}  # methods of torch
TESTS = {("word", "body"): "tests/readers/test_fields.py::test_rules_over_arbitrary_json"}


def of_python(source: str) -> set[tuple[str, str]]:
    """Kind and name of everything of ours in a Python block."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nanovllm"):
            found |= {("name", f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            ours = called[:1].isupper() or "_" in called
            kind = "key" if called == "TrainingConfig" else f"argument of {called}"
            found |= {(kind, word.arg) for word in node.keywords if word.arg and ours}
            if isinstance(node.func, ast.Attribute) and called not in THEIRS:
                found.add(("method", called))
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            found.add(("field", node.slice.value))
        elif isinstance(node, ast.Attribute):
            found.add(("field", node.attr))
    methods = THEIRS | {name for kind, name in found if kind == "method"}
    return {use for use in found if not (use[0] == "field" and use[1] in methods)}


def of_block(block: dict[str, Any]) -> set[tuple[str, str]]:
    """The same of any block."""
    text = block["text"]
    if block["language"] == "python":
        return of_python(text)
    if block["language"] in ("json", "jsonl"):
        try:
            given = [json.loads(text)]
        except json.JSONDecodeError:
            given = [json.loads(line) for line in text.splitlines()]
        config = block["language"] == "json" and isinstance(given[0], dict) and "content..." not in text
        rows = [row for one in given for row in (one if isinstance(one, list) else [one])]
        return {("key" if config else "field of a document", key) for row in rows for key in row if key[0] != "_"}
    found = {("flag", flag) for flag in re.findall(r"--(\w+)", text)}
    for code in re.findall(r'python -c "(.*)"', text):
        found |= of_python(code)
    for document in re.findall(r"<< EOF\n(.*?)EOF", text, re.DOTALL):
        found |= {("key", key) for key in json.loads(document)}
    return found


def table() -> dict[tuple[str, str], list[int]]:
    """Kind and name -> numbers of the blocks that use it."""
    found: dict[tuple[str, str], list[int]] = {}
    for block in blocks.blocks():
        if not blocks.idle(block):
            for use in of_block(block):
                found.setdefault(use, []).append(block["number"])
    prose = re.sub(r"```.*?```", "", blocks.GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    used = {name for _, name in found}
    for code in re.findall(r"`([^`\n]+)`", prose):
        for word in re.findall(r"--(\w+)", code) or ([code] if code.isidentifier() else []):
            if word not in used:
                found.setdefault(("word", word), [])
    return found


def page() -> str:
    """The table as Markdown."""
    lines = ["# What the guide names, and the block or test that uses it", "", "Written by `names.py`.", ""]
    lines += ["| kind | name | blocks |", "| --- | --- | --- |"]
    for use, numbers in sorted(table().items()):
        lines.append(f"| {use[0]} | `{use[1]}` | {', '.join(map(str, numbers)) or TESTS.get(use, '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
