"""Pieces of a training loop of one's own: the optimizer and schedule of a run, and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

import torch
from attrs import frozen
from torch import Tensor, nn

from nanovllm_core.contracts import IGNORE
from nanovllm_core.errors import OptionError, TrainingError
from nanovllm_core.guide.tokenizers import ready
from nanovllm_core.optimisation import Train
from nanovllm_core.training.optimizer import EPS, decayed
from nanovllm_core.training.schedule import Schedule

USUAL = Train()


def create_optimizer(
    model: nn.Module,
    learning_rate: float = USUAL.learning_rate,
    weight_decay: float = USUAL.weight_decay,
    beta1: float = USUAL.beta1,
    beta2: float = USUAL.beta2,
) -> torch.optim.AdamW:
    """AdamW as a run has it: matrices decay, vectors (norms, biases) do not. Parameters without a gradient are left alone."""
    groups = decayed(model.named_parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=EPS, fused=True)


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    scheduler_type: str = "cosine",
    num_warmup_steps: int = 0,
    num_training_steps: int = 1000,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedules of a run (cosine, linear, constant, wsd), one `step()` an optimizer step.

    A warm-up is linear and its first step above zero. Raises OptionError for an unknown type or impossible lengths.
    """
    allowed = get_args(get_type_hints(Train)["lr_scheduler_type"])
    if scheduler_type not in allowed:
        raise OptionError(f"create_scheduler: scheduler_type: got {scheduler_type!r}, allowed: {', '.join(allowed)}")
    if num_training_steps < 1 or num_warmup_steps < 0:
        raise OptionError(
            f"create_scheduler: got {num_warmup_steps} warm-up steps of {num_training_steps}; at least 0, and 1 in all"
        )
    schedule = Schedule(kind=scheduler_type, total=num_training_steps, warmup=num_warmup_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.share)


@frozen
class Metrics:
    """What `evaluate_model` measures."""

    loss: float  # mean over all tokens that are predicted, in nats
    perplexity: float
    bits_per_byte: (
        float  # of the predicted text in UTF-8, a character that a chunk cuts counted twice; NaN without a tokenizer
    )
    tokens: int


def evaluate_model(
    model: nn.Module,
    tokenizer: Any = None,
    eval_dataloader: Iterable[Mapping[str, Any]] = (),
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure a model on batches with `input_ids` and `labels` (and perhaps `attention_mask`).

    The mean is over tokens, so the figures do not depend on how they are batched. `model`: of ours or of transformers; it is
    in the mode (training or not) afterwards that it was in before. Raises TrainingError when there is nothing to predict.
    """
    own = ready(tokenizer) if tokenizer is not None else None
    place = device if device is not None else next(model.parameters()).device
    was, total, tokens, size = model.training, 0.0, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in eval_dataloader:
                given = {k: v.to(place) for k, v in batch.items() if isinstance(v, Tensor)}
                labels = given["labels"][:, 1:]
                trained = int((labels != IGNORE).sum())
                if trained:
                    total += float(model(**given)["loss"]) * trained
                    tokens += trained
                    size += sum(len(own.decode(row[row != IGNORE].tolist()).encode()) for row in labels) if own else 0
    finally:
        model.train(was)
    if not tokens:
        raise TrainingError("evaluate_model: the batches hold no label to predict")
    loss = total / tokens
    bits = total / math.log(2) / size if size else math.nan
    return Metrics(loss=loss, perplexity=math.exp(min(loss, 700.0)), bits_per_byte=bits, tokens=tokens)
