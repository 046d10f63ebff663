"""The guide's data sets: chunks of a folder's documents as `torch` maps them, over the same store as a run's.

A sample holds `input_ids` and `labels` of one length (a model predicts each label from the ids before it; -100 is not
trained) and where it comes from. Tokens lie in a temporary store on disk, gone with the last data set over it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray

from nanovllm_core.contracts import IGNORE, Tokenizer
from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.split import held_out, kept
from nanovllm_core.data.store import Store, open_or_build
from nanovllm_core.errors import DataError
from nanovllm_core.guide.tokenizers import documents_of, ready
from nanovllm_core.plan import overlap_of
from nanovllm_core.recipe import Data

DEFAULT = Data()


@frozen(eq=False)
class _Stored:
    """Tokens on disk, and what keeps them there."""

    store: Store
    tokenizer: Tokenizer
    place: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _Stored, (self.store, self.tokenizer, None)  # the process that made the files keeps them


def _stored(path: str | Path, tokenizer: Any, **data: Any) -> _Stored:
    own, plan = ready(tokenizer), documents_of(path, **data)
    place = tempfile.TemporaryDirectory(prefix="nanovllm-", ignore_cleanup_errors=True)
    return _Stored(open_or_build(Path(place.name), "documents", plan.documents, own), own, place)


class MultiDocumentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Chunks of at most `max_length` tokens of the documents under `data_path`.

    tokenizer: of transformers, a CustomTokenizer, or a folder or hub name
    concatenate_documents: cut all documents as one stream, with `document_separator` between, instead of each by itself
    chunk_overlap: tokens that a chunk repeats from the one before, where they are context and not trained; None: 128, or a
      quarter of max_length if that is less
    min_chunk_size: tokens; where the rest of a document is shorter, its last chunk begins earlier, with context
    train_on_overlap: train repeated tokens in both chunks

    Raises DataError when there is no document, or one cannot be read.
    """

    def __init__(
        self,
        data_path: str | Path,
        tokenizer: Any,
        max_length: int = DEFAULT.max_seq_length,
        concatenate_documents: bool = False,
        chunk_overlap: int | None = None,
        min_chunk_size: int = DEFAULT.min_chunk_size,
        document_separator: str = DEFAULT.document_separator,
        train_on_overlap: bool = False,
        *,
        stored: _Stored | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        """`stored`, `numbers`: tokens that are there already, and which documents of them (`prepare_datasets`)."""
        if max_length < 3:
            raise DataError(f"MultiDocumentDataset: max_length: got {max_length}, at least 3")
        if min_chunk_size < 1:
            raise DataError(f"MultiDocumentDataset: min_chunk_size: got {min_chunk_size}, at least 1")
        overlap = overlap_of(chunk_overlap, max_length).value
        if not 0 <= overlap < max_length - 1:
            raise DataError(
                f"MultiDocumentDataset: chunk_overlap: got {overlap}, allowed: 0 to {max_length - 2}, below max_length"
            )
        self._stored = stored or _stored(data_path, tokenizer)
        store = self._stored.store
        self._numbers = np.arange(len(store)) if numbers is None else numbers
        separator = self._stored.tokenizer.encode([document_separator])[0] if concatenate_documents else None
        self._chunks = Chunks(
            store, self._numbers, length=max_length - 1, overlap=overlap, minimum=min_chunk_size, separator=separator,
            train_on_overlap=train_on_overlap,
        )  # fmt: skip

    @property
    def documents(self) -> Sequence[dict[str, Any]]:
        """Each document: its `text`, `source_file` and `token_count`; read when asked for."""
        return _DocumentList(self._stored, self._numbers)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        number = index % len(self)
        tokens, targets = self._chunks.read(number)
        metadata = self._chunks.metadata(number)
        metadata["token_count"] += 1
        return {
            "input_ids": torch.from_numpy(np.concatenate([tokens, self._chunks.following(number)])),
            "labels": torch.from_numpy(np.concatenate([[IGNORE], targets])),
            "metadata": metadata,
        }


class _DocumentList(Sequence[dict[str, Any]]):
    def __init__(self, stored: _Stored, numbers: NDArray[np.int64]) -> None:
        self.stored, self.numbers = stored, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, store = int(self.numbers[index]), self.stored.store
        ids = store.ids(number).tolist()
        return {"text": self.stored.tokenizer.decode(ids), "source_file": store.source(number), "token_count": len(ids)}


def prepare_datasets(
    data_path: str | Path,
    tokenizer: Any,
    max_length: int = DEFAULT.max_seq_length,
    eval_fraction: float = DEFAULT.eval_fraction,
    seed: int = 42,
    **options: Any,
) -> tuple[MultiDocumentDataset, MultiDocumentDataset]:
    """Training and held-out chunks of the documents, whole documents on either side and copies on the same.

    A single document is not split: nothing is held out then. `options` are MultiDocumentDataset's.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"prepare_datasets: eval_fraction: got {eval_fraction}, at least 0 and below 1")
    stored = _stored(data_path, tokenizer)
    out = held_out(stored.store.contents, eval_fraction, seed)
    sides = (kept(len(stored.store), out), out)
    train, held = (
        MultiDocumentDataset(data_path, tokenizer, max_length, stored=stored, numbers=numbers, **options)
        for numbers in sides
    )
    return train, held


def collate(samples: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Samples as one batch, padded on the right: `input_ids`, `attention_mask` and `labels`, each [samples, tokens]."""
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.full((len(samples), length), pad_id)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        ids[row, :n], labels[row, :n], mask[row, :n] = sample["input_ids"], sample["labels"], 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
