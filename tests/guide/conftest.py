"""Documents, a new model of them, and its folder."""

import random

import pytest

from nanovllm.training import MultiDocumentDataset, collate, create_model_from_scratch

WORDS = [
    "river",
    "stone",
    "light",
    "wind",
    "harbour",
    "letter",
    "morning",
    "engine",
    "garden",
    "winter",
    "silver",
    "paper",
]


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    draw, folder = random.Random(3), tmp_path_factory.mktemp("docs")
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(40 + 20 * i)) + ".")
    return folder


@pytest.fixture(scope="module")
def made(docs):
    return create_model_from_scratch(docs, "tiny", 300)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    model, tokenizer, _ = made
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, tokenizer)
    return path


@pytest.fixture
def batch(docs, made):
    return collate([MultiDocumentDataset(docs, made[1], 64)[i] for i in (0, 3, 5)], pad_id=1)
