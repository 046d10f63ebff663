"""The recipe's `train`: optimisation, evaluation, saving."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from nanovllm_core.options import above, at_least, below, between
from nanovllm_core.training.freezing import Freezing, Thaw, moment


@frozen(kw_only=True)
class Train:
    """Optimisation, evaluation, saving.

    learning_rate: the highest, reached after warm-up
    weight_decay: AdamW's, on matrices
    beta1: AdamW's decay of the mean gradient
    beta2: AdamW's decay of the mean squared gradient
    per_device_train_batch_size: sequences in one forward pass on one device
    gradient_accumulation_steps: forward passes to one optimizer step
    global_batch_size: sequences to one optimizer step over all devices; overrides gradient_accumulation_steps
    num_train_epochs: passes over the documents
    max_steps: stop after this many optimizer steps; null: as many as num_train_epochs needs
    warmup_steps: optimizer steps in which the learning rate rises; null: 100, or a tenth of the run if less
    warmup_ratio: the same as a share of the run; give one of the two
    lr_scheduler_type: how the learning rate falls after warm-up; wsd keeps it until the last decay_ratio of the run
    decay_ratio: wsd's share of the run that decays; null: 0.2
    decay_shape: how wsd decays; null: 1-sqrt, one minus the root of the progress
    mixed_precision: compute type; auto is bf16 on GPU and fp32 on CPU
    master_weights: keep weights, gradients and AdamW's moments in fp32 beside bf16 compute; false keeps them in bf16, in half
      the memory: what is rounded away then is made up for by chance (stochastic rounding)
    gradient_clipping: largest global norm of the gradient; 0 is off
    gradient_checkpointing: run each block again in the backward instead of keeping its activations; less memory, a third
      more arithmetic, the same figures; selective does so for every second block
    freeze: parameters that are not trained, as patterns over their names, e.g. "model.layers.0.*"
    unfreeze: parameters that are frozen until a moment, e.g. [{at: 0.5, parameters: ["model.layers.*"]}]
    unfreeze_blocks_every: steps, or share of the run; blocks are frozen and thaw one by one, from the last down
    on_bad_step: what a loss that is not finite or spikes does; stop ends the run, skip leaves the step out
    max_bad_steps: skipped steps in a row that end the run all the same
    spike_factor: a loss above this many times the running median is bad; null: only one that is not finite
    early_stopping_patience: evaluations without a better eval_loss that end the run; null: never
    early_stopping_min_delta: by how much eval_loss must fall to count as better
    eval_steps: optimizer steps between evaluations; each checkpoint is evaluated too
    save_steps: optimizer steps between checkpoints
    save_total_limit: newest checkpoints that are kept, beside the best; null keeps all
    logging_steps: optimizer steps between logged figures
    deterministic: bit-identical losses and weights on 1, 2, 4, ... ranks (single, ddp), and on a GPU a resume that is bit for
      bit; slower
    rank_timeout: seconds that a rank waits for the others before the run stops
    seed: of new weights, the held-out split and the order of samples
    """

    learning_rate: float = field(default=5e-5, validator=above(0))
    weight_decay: float = field(default=0.01, validator=at_least(0))
    beta1: float = field(default=0.9, validator=[at_least(0), below(1)])
    beta2: float = field(default=0.95, validator=[at_least(0), below(1)])
    per_device_train_batch_size: int = field(default=2, validator=between(1, 1_000_000))
    gradient_accumulation_steps: int = field(default=4, validator=between(1, 1_000_000))
    global_batch_size: int | None = field(default=None, validator=between(1, 1_000_000))
    num_train_epochs: int | float = field(default=3, validator=above(0))
    max_steps: int | None = field(default=None, validator=at_least(1))
    warmup_steps: int | None = field(default=None, validator=at_least(0))
    warmup_ratio: float | None = field(default=None, validator=[at_least(0), below(1)])
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_ratio: float | None = field(default=None, validator=[above(0), between(0, 1)])
    decay_shape: Literal["1-sqrt", "linear"] | None = field(default=None)
    mixed_precision: Literal["auto", "bf16", "fp32"] = "auto"
    master_weights: bool = True
    gradient_clipping: float = field(default=1.0, validator=at_least(0))
    gradient_checkpointing: bool | Literal["selective"] = False
    freeze: tuple[str, ...] = ()
    unfreeze: tuple[Thaw, ...] = ()
    unfreeze_blocks_every: int | float | None = field(default=None, validator=moment)
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_bad_steps: int = field(default=10, validator=at_least(1))
    spike_factor: float | None = field(default=None, validator=above(1))
    early_stopping_patience: int | None = field(default=None, validator=at_least(1))
    early_stopping_min_delta: float = field(default=0.0, validator=at_least(0))
    eval_steps: int = field(default=500, validator=at_least(1))
    save_steps: int = field(default=1000, validator=at_least(1))
    save_total_limit: int | None = field(default=3, validator=at_least(1))
    logging_steps: int = field(default=10, validator=at_least(1))
    deterministic: bool = False
    rank_timeout: float = field(default=600.0, validator=between(1, 1_000_000))
    seed: int = field(default=42, validator=[at_least(0), below(2**63)])

    @property
    def freezing(self) -> Freezing:
        """What of the model is frozen, and until when."""
        return Freezing(freeze=self.freeze, unfreeze=self.unfreeze, blocks_every=self.unfreeze_blocks_every)

    @warmup_ratio.validator
    def _one_warm_up(self, attribute: Any, value: float | None) -> None:
        if value is not None and self.warmup_steps is not None:
            raise ValueError(f"got {value} beside warmup_steps {self.warmup_steps}; give one of the two")

    @decay_ratio.validator
    @decay_shape.validator
    def _of_wsd(self, attribute: Any, value: Any) -> None:
        if value is not None and self.lr_scheduler_type != "wsd":
            raise ValueError(f"got {value}, which lr_scheduler_type {self.lr_scheduler_type} has no use for; wsd has")
