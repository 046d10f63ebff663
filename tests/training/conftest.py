"""A tiny model, steps of documents with random lengths, and someone who listens."""

from types import SimpleNamespace

import pytest
import torch
from attrs import define, field, frozen

from nanovllm_core.assemble import assemble
from nanovllm_core.contracts import IGNORE, Batch, MicroBatch, Step
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.training.evaluate import Evaluation
from nanovllm_core.training.schedule import Schedule
from nanovllm_core.training.trainer import Settings, Trainer

VOCABULARY, STEPS, LR, DECAY, WARMUP, CLIP = 300, 8, 3e-4, 0.1, 3, 0.5


@define(eq=False)
class Heard:
    notes: list = field(factory=list)
    steps: dict = field(factory=dict)
    evaluations: dict = field(factory=dict)
    tables: dict = field(factory=dict)

    def note(self, text):
        self.notes.append(text)

    def step_done(self, step, metrics):
        self.steps[step] = metrics

    def evaluated(self, step, metrics):
        self.evaluations[step] = metrics

    def evaluated_by_source(self, step, table):
        self.tables[step] = table


@frozen(eq=False)
class Fixed:
    """Steps of given micro-batches."""

    documents: list  # a step -> a micro-batch -> (tokens, targets) of each document

    def step(self, position):
        micro = tuple(micro_batch(pairs) for pairs in self.documents[position])
        trained = sum(m.trained for m in micro)
        return Step(micro_batches=micro, trained=trained, tokens=trained, next_position=position + 1, epoch=0.0)

    def sources(self, position):
        return [f"step{position}-document{i}.txt" for micro in self.documents[position] for i in range(len(micro))]


@frozen
class Row:
    source: str
    text_bytes: int


def micro_batch(pairs):
    lengths = tuple(len(t) for t, _ in pairs)
    targets = torch.cat([t for _, t in pairs])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = Batch(positions=torch.cat([torch.arange(n) for n in lengths]), lengths=lengths, cu_seqlens=bounds)
    trained = int((targets != IGNORE).sum())
    return MicroBatch(tokens=torch.cat([t for t, _ in pairs]), targets=targets, batch=batch, trained=trained)


def random_documents(seed, steps=STEPS, micro_batches=(3, 5)):
    """Documents of 2 to 39 tokens, a fifth of their targets untrained."""
    generator = torch.Generator().manual_seed(seed)

    def document():
        ids = torch.randint(0, VOCABULARY, (int(torch.randint(2, 40, (), generator=generator)),), generator=generator)
        targets = ids.roll(-1)
        targets[-1] = IGNORE
        targets[torch.rand(len(ids), generator=generator) < 0.2] = IGNORE
        return ids, targets

    return [[[document() for _ in range(n)] for n in micro_batches] for _ in range(steps)]


def settings(total=STEPS, warmup=WARMUP, kind="cosine", **changes):
    values = {
        "schedule": Schedule(kind=kind, total=total, warmup=warmup), "learning_rate": LR, "weight_decay": DECAY,
        "betas": (0.9, 0.95), "clipping": CLIP, "logging_steps": 1, "eval_steps": 4, "save_steps": 3,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def evaluation(parts, size=1234):
    """One row for all."""
    return Evaluation(batches=lambda rank, size: [(0, part) for part in parts], table=[Row("all.txt", size)])


@pytest.fixture(scope="session")
def plan():
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": VOCABULARY}}
    return plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())


@pytest.fixture(scope="session")
def tiny(plan):
    """What the tests of this folder share."""

    def trainer(documents, heard=None, evaluation=None, model=None, **changes):
        model = model or assemble(plan, "cpu", seed=5, training=True)
        return Trainer(model, Fixed(documents), settings(**changes), heard or Heard(), evaluation)

    return SimpleNamespace(
        model=lambda: assemble(plan, "cpu", seed=5, training=True),
        trainer=trainer, Heard=Heard, Fixed=Fixed, Row=Row, micro_batch=micro_batch, random_documents=random_documents,
        evaluation=evaluation, LR=LR, DECAY=DECAY, WARMUP=WARMUP, CLIP=CLIP, STEPS=STEPS, VOCABULARY=VOCABULARY,
    )  # fmt: skip
