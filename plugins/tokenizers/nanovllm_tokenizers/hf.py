"""The tokenizer of an existing model: a folder or hub name, opened by transformers, used through its Rust part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attrs import frozen

from nanovllm_core import hub
from nanovllm_core.contracts import Decision, ModelRef, Tokenizer
from nanovllm_core.errors import ModelError
from nanovllm_core.files import read_json
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.literals import literal
from nanovllm_core.weights import CONFIG, read_config
from nanovllm_tokenizers.fast import FastTokenizer

SUFFIXES = (".json", ".jinja", ".model", ".txt")
MOST = 256 << 20  # bytes of one file: several times the largest real vocabulary
SETTINGS, TEKKEN = "tokenizer_config.json", "tekken.json"
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # what tokenizer_config.json calls it, by version
PROBES = ("a", "Hello world")


@frozen(kw_only=True, eq=False)
class Hf:
    """The tokenizer of an existing model, by folder or hub name.

    path: folder with tokenizer.json, .gguf file, or hub name such as Qwen/Qwen3-0.6B
    """

    path: ModelRef

    @hookimpl
    def vocab_size(self, data_bytes: int) -> Decision:
        """One more than its highest id."""
        tokenizer = load(str(self.path))
        return Decision(tokenizer.vocab_size, f"the tokenizer of {self.path} has {tokenizer.vocab_size:,} ids")

    @hookimpl
    def make(self, texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
        """The tokenizer as it is; the texts are not looked at."""
        return load(str(self.path))


def load(path: str) -> HfTokenizer:
    """The tokenizer of a folder, GGUF file or hub name; opened once while its files stay the same. Raises ModelError."""
    gguf = Path(path).expanduser() if hub.is_gguf(path) else None
    folder = gguf.parent if gguf else hub.resolve(path, weights=False)
    files = [gguf] if gguf else _files(folder)
    return _load(folder, gguf, tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in files))


def _files(folder: Path) -> list[Path]:
    """What transformers may read there. Raises ModelError for a link out of the folder, a pipe or a file beyond belief."""
    inner = folder / "chat_templates"
    files = [
        hub.inside(p.parent, p.name)
        for place in (folder, inner)
        if place.is_dir()
        for p in sorted(place.iterdir())
        if p.suffix in SUFFIXES
    ]
    if inner.is_symlink():
        raise ModelError(f"{inner}: is a link out of the model's folder; copy the files there instead")
    for file in files:
        if file.stat().st_size > MOST:
            raise ModelError(f"{file}: {file.stat().st_size:,} bytes; at most {MOST:,} are read")
    return files


@lru_cache(maxsize=2)
def _load(folder: Path, gguf: Path | None, state: object) -> HfTokenizer:
    more: dict[str, Any] = {"local_files_only": True}
    if gguf is None and _is_generic(folder):
        from transformers import PreTrainedTokenizerFast as Opener
    else:
        from transformers import AutoTokenizer as Opener

        more |= {"trust_remote_code": False, **({"gguf_file": gguf.name} if gguf else _strange_model(folder))}
    given = gguf or folder
    try:
        opened = Opener.from_pretrained(str(folder), **more)
    except Exception as e:  # the Rust parser raises bare Exception
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise ModelError(f"{given}: no tokenizer that transformers can open there ({lines[0]})") from e
    return HfTokenizer(opened, given)


def _is_generic(folder: Path) -> bool:
    """Whether AutoTokenizer would take the class that reads tokenizer.json as it is; asking it imports seconds of others."""
    wanted = all((folder / name).is_file() for name in (CONFIG, SETTINGS, "tokenizer.json"))
    if not wanted or (folder / TEKKEN).exists():
        return False
    try:
        settings = read_json(folder / SETTINGS)
        replaced = literal("transformers", "models.auto.tokenization_auto", "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS")
        named = settings.get("tokenizer_class") in GENERIC and "auto_map" not in settings
    except (OSError, ValueError, AttributeError, TypeError, ImportError):  # AutoTokenizer says what is wrong
        return False
    return named and read_config(folder).get("model_type") not in {None, *replaced}


def _strange_model(folder: Path) -> dict[str, Any]:
    """The configuration of a model that transformers does not know, at which it would warn; a tokenizer needs no model."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    if "model_type" not in config or config["model_type"] in CONFIG_MAPPING:
        return {}
    return {"config": PretrainedConfig.from_dict(config)}


class HfTokenizer(FastTokenizer):
    """A transformers tokenizer, by its backend."""

    def __init__(self, opened: Any, folder: Path) -> None:
        from tokenizers import Tokenizer as Backend

        backend = getattr(opened, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise ModelError(
                f"{folder}: its tokenizer ({type(opened).__name__}) has no fast backend; save it once with "
                "transformers so that the folder holds a tokenizer.json"
            )
        if opened.eos_token_id is None:
            raise ModelError(f"{folder}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
        self.opened, self.folder = opened, folder
        template = opened.chat_template or ""
        super().__init__(
            Backend.from_str(backend.to_str()),
            prefix_ids=_prefix(opened, folder),
            end_id=opened.eos_token_id,
            stop_ids=_stop_ids(folder),
            template=template if isinstance(template, str) else json.dumps(template, sort_keys=True),
        )

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        """The chat template applied: markup text. Raises ModelError when there is none or it refuses the messages."""
        if not self.has_chat_template:
            raise ModelError(f"{self.folder}: the tokenizer has no chat template")
        from jinja2 import TemplateError

        try:
            conversation = [dict(m) for m in messages]
            return str(self.opened.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next))
        except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError) as e:
            raise ModelError(
                f"{self.folder}: the chat template refuses the conversation ({str(e) or type(e).__name__})"
            ) from e

    def save(self, folder: Path) -> None:
        """Write what transformers writes for it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.opened.save_pretrained(str(folder))


def _prefix(opened: Any, folder: Path) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text."""
    found = set()
    for text in PROBES:
        bare = opened(text, add_special_tokens=False)["input_ids"]
        full = opened(text, add_special_tokens=True)["input_ids"]
        starts = [k for k in range(len(full) - len(bare) + 1) if full[k : k + len(bare)] == bare]
        found.add(tuple(full[: starts[0]]) if starts else None)
    if len(found) != 1 or None in found:
        raise ModelError(f"{folder}: its tokenizer changes a text when it adds special tokens, which is not supported")
    return found.pop() or ()


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """End tokens that generation_config.json names beside the tokenizer's own."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        given = json.loads(path.read_text("utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path}: not a JSON object ({e})") from e
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise ModelError(f"{path}: eos_token_id is {str(given)[:60]}, expected a token id or a list of them")
    return tuple(ids)
