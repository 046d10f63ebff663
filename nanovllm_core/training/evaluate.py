"""Held-out figures of a model: loss, perplexity and bits per byte, over all and by source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from attrs import frozen

from nanovllm_core.contracts import MicroBatch, Parallelized
from nanovllm_core.training.sharding import of_all_ranks

Figures = Mapping[str, float]


class Row(Protocol):
    """One line of the table by source."""

    @property
    def source(self) -> str: ...

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text whose tokens are predicted, over all ranks."""
        ...


@frozen(kw_only=True)
class Evaluation:
    """What is held out. `batches(rank, size)` gives a data rank's part of it anew, turn by turn: each micro-batch with the
    row of `table` that it counts for."""

    batches: Callable[[int, int], Iterable[tuple[int, MicroBatch]]]
    table: Sequence[Row]
    turns: int = 0  # micro-batches of all ranks; 0: not known


def evaluate(model: Parallelized, evaluation: Evaluation) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures over everything, and for each row of the table that has a token: source, tokens and its figures.

    Each is weighted by token. Loss is in nats a token; bits per byte compares models with different vocabularies, which
    loss and perplexity cannot. Logits are made and dropped a micro-batch (or a part of one) at a time.
    """
    module, table = model.module, evaluation.table
    sums = torch.zeros(len(table), 2, dtype=torch.float64)  # summed loss, tokens
    mine: list[tuple[float, float, float]] = []  # row, summed loss, tokens of each turn
    module.train(False)
    with torch.no_grad():  # not inference_mode: a sharded model keeps what it gathers, and training goes on with it
        for row, micro in evaluation.batches(model.data_rank, model.data_size):
            mine.append((row, float(model(micro.tokens, micro.batch, micro.targets)), micro.trained))
        turns = of_all_ranks(model, torch.tensor(mine, dtype=torch.float64).reshape(-1, 3))
        for row, loss, tokens in turns.flatten(0, 1).tolist():  # in one order, whoever made them
            sums[int(row)] += torch.tensor([loss, tokens], dtype=torch.float64)
    module.train(True)
    rows = [(row, float(loss), int(tokens)) for row, (loss, tokens) in zip(table, sums.tolist(), strict=True)]
    by_source = [{"source": r.source, "tokens": n, **figures(loss, n, r.text_bytes)} for r, loss, n in rows if n]
    loss, tokens, size = sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r.text_bytes for r in table)
    return {f"eval_{name}": value for name, value in figures(loss, tokens, size).items()}, by_source


def figures(loss: float, tokens: int, text_bytes: int) -> dict[str, float]:
    """Mean loss, perplexity and bits per byte of a summed loss (nats)."""
    mean = loss / max(1, tokens)
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / max(1, text_bytes),
    }
