"""Tokenizers as the guide's objects take them, and its `CustomTokenizer`: a vocabulary made from documents."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.data.encode import groups
from nanovllm_core.errors import ModelError
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Tokenizers
from nanovllm_core.plan_data import DataPlan, plan_data
from nanovllm_core.recipe import Component, Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.slots import Slots

WORDS = 1_000_000  # different words that are remembered while they are counted
COMMON = 100  # tokens that `most_common` lists


def documents_of(path: str | Path, registry: Registry | None = None, **data: Any) -> DataPlan:
    """The documents under a path, as a run would read them; `data`: other keys of the recipe's. Raises DataError."""
    recipe = Recipe.from_data({"data": {"path": str(path), **data}})
    return plan_data(Slots(registry or Registry.from_environment(), recipe), Path(tempfile.gettempdir()) / "no run")


def component(use: str, registry: Registry | None = None, **options: Any) -> Tokenizers:
    """An installed tokenizer component's hooks."""
    slots = Slots(registry or Registry.from_environment(), Recipe())
    named = slots.named("tokenizers", Component(use=use, options=options))
    return bind(Tokenizers, [(named.entry.full_name, named.component)])


def ready(tokenizer: Any) -> Tokenizer:
    """A tokenizer of ours, of transformers, or a folder or hub name, as the data path takes it. Raises ModelError."""
    if isinstance(tokenizer, CustomTokenizer):
        return tokenizer.ready
    if all(hasattr(tokenizer, name) for name in ("prefix_ids", "end_id", "fingerprint", "encode")):
        given: Tokenizer = tokenizer
        return given
    if isinstance(tokenizer, str | Path):
        return component("hf", path=str(tokenizer)).make(texts=lambda: (), vocab_size=0, kept=None)
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
            tokenizer.save_pretrained(folder)
            return component("hf", path=folder).make(texts=lambda: (), vocab_size=0, kept=None)
    raise ModelError(
        f"got a {type(tokenizer).__name__} as tokenizer; give one of transformers, a CustomTokenizer, or a folder or hub name"
    )


class CustomTokenizer:
    """A byte-level BPE vocabulary of its own, made from documents: no text is unknown.

    vocab_size: ids; None chooses by the amount of text
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        self._wanted = vocab_size
        self._component = component("bpe", size=vocab_size)
        self._ready: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> CustomTokenizer:
        """One whose vocabulary is there."""
        made = cls(tokenizer.vocab_size)
        made._ready = tokenizer
        return made

    def build_vocab_from_documents(self, path: str | Path) -> dict[str, Any]:
        """Make the vocabulary from the documents under `path`; its figures (`vocab_stats`). Raises DataError."""
        documents = documents_of(path).documents
        size = self._component.vocab_size(data_bytes=documents.bytes).value
        self._ready = self._component.make(texts=lambda: documents.texts(), vocab_size=size, kept=None)
        return vocab_stats(self._ready, documents.texts)

    @property
    def ready(self) -> Tokenizer:
        """The vocabulary. Raises ModelError before there is one."""
        if self._ready is None:
            raise ModelError("CustomTokenizer has no vocabulary yet: call build_vocab_from_documents(PATH) first")
        return self._ready

    @property
    def vocab_size(self) -> int | None:
        """Ids of the vocabulary; before it is made, what was asked for."""
        return self._wanted if self._ready is None else self._ready.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a begin or end token."""
        return self.ready.encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.ready.decode(list(ids))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that `transformers.AutoTokenizer` opens."""
        self.ready.save(Path(folder))

    def __len__(self) -> int:
        return self.ready.vocab_size


def vocab_stats(tokenizer: Tokenizer, texts: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """Figures of a vocabulary over documents.

    vocab_size; coverage: the share of the documents' words (separated by white space, each as often as it occurs) that are
    one token, with or without a space before; most_common: the (token's text, count) that occur most often; total_tokens;
    total_words.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    whole: dict[str, bool] = {}
    words = single = 0
    for group in groups(texts(), len):
        for ids in tokenizer.encode(group):
            counts += np.bincount(np.asarray(ids, np.int64), minlength=len(counts))
        found = Counter(word for text in group for word in text.split())
        if len(whole) > WORDS:
            whole.clear()
        new = [word for word in found if word not in whole]
        for word, bare, spaced in zip(
            new, tokenizer.encode(new), tokenizer.encode([f" {w}" for w in new]), strict=True
        ):
            whole[word] = len(bare) == 1 or len(spaced) == 1
        words += found.total()
        single += sum(n for word, n in found.items() if whole[word])
    order = np.argsort(-counts, kind="stable")[:COMMON]
    return {
        "vocab_size": tokenizer.vocab_size,
        "coverage": single / words if words else 0.0,
        "most_common": [(tokenizer.decode([int(i)]), int(counts[i])) for i in order if counts[i]],
        "total_tokens": int(counts.sum()),
        "total_words": words,
    }
