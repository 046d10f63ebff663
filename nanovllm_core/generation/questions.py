"""Prompts from a file or the command line: each with its place, its parameters and what its answer repeats of it.

The file is read twice, once to check every line before anything is answered and once to answer it, so that memory holds a
window of it. Both passes take the same bytes: a file that changes between them is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import evolve, fields, frozen

from nanovllm_core.errors import GenerationError, nearest
from nanovllm_core.files import sibling
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.options import shown

TEXT, LINES = (".txt",), (".jsonl", ".ndjson")
SAMPLING = tuple(a.name for a in fields(SamplingParams))
ASKS = ("prompt", "messages", "token_ids")
KEYS = (*ASKS, "id", *SAMPLING)
TOLD = 10  # problems of one file


@frozen
class Question:
    """One prompt, or one conversation."""

    index: int  # 0-based, blank lines not counted
    place: str  # file:line
    asked: str | list[int] | list[dict[str, str]]
    chat: bool
    params: SamplingParams
    told: dict[str, Any]  # what the answer's line begins with


class Questions:
    """The prompts of a file, or those given. Iterating raises GenerationError at what is wrong."""

    def __init__(self, given: Path | Sequence[str], params: SamplingParams) -> None:
        """params: where a line says nothing else. A line without a seed of its own draws with one made of `params.seed` and
        its index."""
        self.given, self.params = given, params
        self.name = str(given) if isinstance(given, Path) else "--prompt"
        self.count, self.sha256 = 0, ""
        self._state: tuple[int, ...] = ()

    def check(self) -> None:
        """Read everything; sets `count` and `sha256`. Raises GenerationError with the first problems and their places."""
        whole, problems, self.count = hashlib.sha256(), list[str](), 0
        for found in self._read(whole.update):
            self.count += 1
            if isinstance(found, str):
                problems.append(found)
        if problems:
            raise GenerationError(listed(problems))
        if not self.count:
            raise GenerationError(f"{self.name}: holds no prompt; give at least one line")
        self.sha256 = whole.hexdigest()

    def __iter__(self) -> Iterator[Question]:
        for found in self._read(lambda data: None):
            if isinstance(found, str):
                raise GenerationError(found)
            yield found

    def _read(self, hear: Any) -> Iterator[Question | str]:
        """Each question, or what is wrong with it."""
        index = 0
        for place, line in self._lines():
            hear(line)
            try:
                data = self._data(line)
                if data is not None:
                    yield self._question(index, place, data)
                    index += 1
            except GenerationError as e:
                yield f"{place}: {e}"
                index += 1

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        if not isinstance(self.given, Path):
            for i, text in enumerate(self.given, 1):
                yield f"--prompt {i}", json.dumps({"prompt": text}).encode()
            return
        path = self.given
        if path.suffix not in (*TEXT, *LINES):
            raise GenerationError(
                f"{path}: a file of prompts is .jsonl (one object a line) or .txt (one prompt a line); name it so"
            )
        try:
            if path.exists() and not path.is_file():
                raise GenerationError(f"{path}: is no file; it is read twice, so a pipe will not do")
            with path.open("rb") as file:
                self._unchanged(file.fileno())
                for number, line in enumerate(file, 1):
                    yield f"{path}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                self._unchanged(file.fileno())
        except FileNotFoundError:
            raise GenerationError(f"{path}: no such file{sibling(path)}") from None
        except OSError as e:
            raise GenerationError(f"{path}: cannot be read ({e.strerror or e})") from e

    def _unchanged(self, handle: int) -> None:
        now = os.fstat(handle)
        state = (now.st_ino, now.st_size, now.st_mtime_ns)
        if self._state and state != self._state:
            raise GenerationError(f"{self.given}: changed while it was read; leave it as it is and start again")
        self._state = state

    def _data(self, line: bytes) -> dict[str, Any] | None:
        """What a line says; None for a blank one."""
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            raise GenerationError(
                f"byte {e.start + 1} is not valid UTF-8 ({e.reason}); save the file as UTF-8"
            ) from None
        if not text.strip():
            return None
        if isinstance(self.given, Path) and self.given.suffix in TEXT:
            return {"prompt": text.rstrip("\r\n")}
        try:
            data = json.loads(text.rstrip(), object_pairs_hook=_once, parse_constant=_no_number)
        except json.JSONDecodeError as e:
            raise GenerationError(f"no JSON at character {e.pos + 1}: {e.msg}") from None
        except (ValueError, RecursionError) as e:
            raise GenerationError(f"no JSON: {e}") from None
        if not isinstance(data, dict):
            raise GenerationError(f'got {shown(data)}, allowed: an object such as {{"prompt": "..."}}')
        return data

    def _question(self, index: int, place: str, data: dict[str, Any]) -> Question:
        for key in data:
            if key not in KEYS:
                raise GenerationError(f"unknown key {key!r}{nearest(key, KEYS)} (allowed: {', '.join(KEYS)})")
        kinds = [key for key in ASKS if key in data]
        if len(kinds) != 1:
            raise GenerationError(f"got {' and '.join(kinds) or 'none'} of {', '.join(ASKS)}; give one")
        kind, asked = kinds[0], data[kinds[0]]
        _CHECKS[kind](asked)
        told: dict[str, Any] = {"index": index}
        if "id" in data:
            if isinstance(data["id"], bool) or not isinstance(data["id"], str | int):
                raise GenerationError(f"id: got {shown(data['id'])}, allowed: a text or a whole number")
            told["id"] = data["id"]
        told["prompt_token_ids" if kind == "token_ids" else kind] = asked
        own = {key: data[key] for key in SAMPLING if key in data}
        return Question(index, place, asked, kind == "messages", self._params(index, own), told)

    def _params(self, index: int, own: dict[str, Any]) -> SamplingParams:
        for key, allowed in (("stop", "a text or a list of texts"), ("stop_token_ids", "a list of token ids")):
            if key in own and not isinstance(own[key], list if key == "stop_token_ids" else list | str):
                raise GenerationError(f"{key}: got {shown(own[key])}, allowed: {allowed}")
        if "seed" not in own and self.params.seed is not None:
            own["seed"] = seed_of(self.params.seed, index)
        try:
            return evolve(self.params, **own)
        except GenerationError as e:
            raise GenerationError(str(e).removeprefix("SamplingParams: ")) from None


def seed_of(seed: int, index: int) -> int:
    """The seed of one line: answers do not depend on which lines are asked together, or asked again."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8]) >> 1


def listed(problems: Sequence[str]) -> str:
    """The first problems of a file."""
    more = len(problems) - TOLD
    return "\n".join([*problems[:TOLD], *([f"and {more:,} more"] if more > 0 else [])])


def _text(asked: Any) -> None:
    if not isinstance(asked, str):
        raise GenerationError(f"prompt: got {shown(asked)}, allowed: a text")


def _ids(asked: Any) -> None:
    if not isinstance(asked, list) or not asked or not all(type(i) is int for i in asked):
        raise GenerationError(f"token_ids: got {shown(asked)}, allowed: a list of token ids that is not empty")


def _messages(asked: Any) -> None:
    good = '{"role": text, "content": text}'
    if not isinstance(asked, list) or not asked:
        raise GenerationError(f"messages: got {shown(asked)}, allowed: a list of {good} that is not empty")
    for i, m in enumerate(asked):
        if (
            not isinstance(m, dict)
            or m.keys() != {"role", "content"}
            or not all(isinstance(v, str) for v in m.values())
        ):
            raise GenerationError(f"messages[{i}]: got {shown(m)}, allowed: {good}")


_CHECKS = MappingProxyType({"prompt": _text, "token_ids": _ids, "messages": _messages})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in names if names.count(key) > 1)!r} is given twice")
    return data


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
