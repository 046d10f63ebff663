"""From the recipe's `train` to the training loop's settings, once the run's length is known."""

from __future__ import annotations

from nanovllm_core.optimisation import Train
from nanovllm_core.training.best import Patience
from nanovllm_core.training.guard import BadSteps
from nanovllm_core.training.schedule import DECAY_RATIO, DECAY_SHAPE, Schedule
from nanovllm_core.training.trainer import Settings


def settings_of(train: Train, total: int) -> Settings:
    """The settings of a run of `total` optimizer steps."""
    patience = train.early_stopping_patience
    return Settings(
        schedule=Schedule(
            kind=train.lr_scheduler_type,
            total=total,
            warmup=_warmup(train, total),
            decay_ratio=DECAY_RATIO if train.decay_ratio is None else train.decay_ratio,
            decay_shape=train.decay_shape or DECAY_SHAPE,
        ),
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=(train.beta1, train.beta2),
        clipping=train.gradient_clipping,
        logging_steps=train.logging_steps,
        eval_steps=train.eval_steps,
        save_steps=train.save_steps,
        gradient_checkpointing=train.gradient_checkpointing,
        freezing=train.freezing,
        bad_steps=BadSteps(
            skip=train.on_bad_step == "skip", in_a_row=train.max_bad_steps, spike_factor=train.spike_factor
        ),
        patience=None if patience is None else Patience(evaluations=patience, min_delta=train.early_stopping_min_delta),
    )


def _warmup(train: Train, total: int) -> int:
    if train.warmup_ratio is not None:
        return round(train.warmup_ratio * total)
    return train.warmup_steps if train.warmup_steps is not None else min(100, total // 10)
