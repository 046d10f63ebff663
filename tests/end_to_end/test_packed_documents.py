"""Packing is exact through the whole data path: files, store, windows, packing, batches, model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from nanovllm_tokenizers.bpe import train

from nanovllm_core import Machine, Recipe, Registry, make_plan
from nanovllm_core.assemble import assemble
from nanovllm_core.contracts import Batch, MicroBatch
from nanovllm_core.data.batches import Batches
from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.packing import Packing, pack
from nanovllm_core.data.store import open_or_build

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "old",
    "mills",
    "and",
    "under",
    "a",
    "stone",
    "bridge",
    "where",
    "children",
    "fish",
]
LENGTH, PERTURBED = 48, 3


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = np.random.default_rng(11)
    return [" ".join(draw.choice(WORDS, n)) for n in draw.integers(4, 90, 24)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train(texts, 400)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "a.txt").write_text("x")
    recipe = Recipe.from_data({
        "data": {"path": str(folder)}, "model": {"use": "preset", "size": "tiny"},
        "tokenizer": {"use": "bpe", "size": 400}, "output_dir": str(folder / "out"),
    })  # fmt: skip
    plan = make_plan(recipe, Registry.from_environment(), Machine())
    return assemble(plan.model, "cpu", seed=3, training=True).module


def path_of(folder: Path, texts: list[str], tokenizer) -> tuple[Chunks, Packing]:
    (folder / "documents").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "documents" / f"{number:02}.txt").write_text(text)
    recipe = Recipe.from_data({
        "data": {"path": str(folder / "documents")}, "model": {"use": "preset", "size": "tiny"},
        "tokenizer": {"use": "bpe", "size": 400}, "output_dir": str(folder / "out"),
    })  # fmt: skip
    documents = make_plan(recipe, Registry.from_environment(), Machine()).data.documents
    store = open_or_build(folder / "tokens", "k" * 64, documents, tokenizer)
    chunks = Chunks(store, np.arange(len(texts)), length=LENGTH, overlap=8, minimum=8)
    return chunks, pack(chunks.lengths, LENGTH, 5)


def micro_batches(chunks: Chunks, packing: Packing) -> list[tuple[MicroBatch, list[int]]]:
    """All of an epoch, each with the numbers of its windows."""
    batches = Batches(chunks, packing, seed=1, rows_per_step=len(packing), rows=3)
    order = batches.sequences(0, len(packing))
    found = batches.step(0).micro_batches
    return [
        (micro, [int(w) for s in order[i * 3 : i * 3 + 3] for w in packing.sequence(int(s))])
        for i, micro in enumerate(found)
    ]


@torch.no_grad()
def test_another_document_changes_no_bit(tmp_path, texts, tokenizer, module) -> None:
    first, *rest = texts[PERTURBED].split(" ")
    other = [*texts]
    other[PERTURBED] = " ".join([first, *reversed(rest)])  # as many tokens
    chunks, packing = path_of(tmp_path / "a", texts, tokenizer)
    changed, same = path_of(tmp_path / "b", other, tokenizer)
    assert np.array_equal(packing.windows, same.windows)
    assert packing.fill > 0.9
    touched = neighbours = 0
    for (one, windows), (two, _) in zip(micro_batches(chunks, packing), micro_batches(changed, same), strict=True):
        logits = [module(m.tokens, m.batch) for m in (one, two)]
        bounds = np.cumsum([0, *one.batch.lengths])
        for window, (a, b) in zip(windows, pairwise(bounds), strict=True):
            if int(chunks.windows.unit[window]) == PERTURBED:
                touched += not torch.equal(logits[0][a:b], logits[1][a:b])
            else:
                neighbours += 1
                assert torch.equal(logits[0][a:b], logits[1][a:b])
    assert touched == int((chunks.windows.unit == PERTURBED).sum()) > 0
    assert neighbours > 20


@torch.no_grad()
def test_packed_loss_is_the_sum_of_separate_ones(tmp_path, texts, tokenizer, module) -> None:
    chunks, packing = path_of(tmp_path, texts, tokenizer)
    packed = alone = 0.0
    trained = 0
    for micro, _ in micro_batches(chunks, packing):
        packed += float(module(micro.tokens, micro.batch, targets=micro.targets).double())
        trained += micro.trained
    for number in range(len(chunks)):
        tokens, targets = map(torch.from_numpy, chunks.read(number))
        batch = Batch(
            positions=torch.arange(len(tokens)),
            lengths=(len(tokens),),
            cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        )
        alone += float(module(tokens, batch, targets=targets).double())
    assert packed == pytest.approx(alone, rel=1e-6)
    assert trained == sum(len(ids) + 1 for ids in tokenizer.encode(texts))  # each token once, the end included
