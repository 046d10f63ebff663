"""Held-out figures of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from nanovllm_core.contracts import MicroBatch, Parallelized


def evaluate(model: Parallelized, batches: Iterable[MicroBatch], text_bytes: int) -> dict[str, float]:
    """Loss (nats a token), perplexity and bits per byte over held-out batches.

    `text_bytes`: UTF-8 bytes of all the text whose tokens are predicted, over all ranks; bits per byte compares models
    with different vocabularies, which loss and perplexity cannot.
    """
    module = model.module
    module.train(False)
    with torch.inference_mode():
        loss, count = 0.0, 0
        for micro in batches:
            loss += float(module(micro.tokens, micro.batch, targets=micro.targets))
            count += micro.trained
        loss, trained = (float(v) for v in model.total(torch.tensor([loss, count], dtype=torch.float64)))
    module.train(True)
    mean = loss / max(1.0, trained)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_bits_per_byte": loss / math.log(2) / max(1, text_bytes),
    }
