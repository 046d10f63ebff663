"""`CheckpointManager`: the checkpoints of a run for a training loop of one's own. The same files, the same promises."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import nn

from nanovllm_core.contracts import Tokenizer
from nanovllm_core.errors import CheckpointError
from nanovllm_core.files import read_json
from nanovllm_core.guide.config import TrainingConfig
from nanovllm_core.guide.tokenizers import ready
from nanovllm_core.training import checkpoint
from nanovllm_core.training.checkpoint import State
from nanovllm_core.training.export import write_config
from nanovllm_core.training.parts import KEYS, Snapshot, load_optimizer, snapshot, untrained
from nanovllm_core.training.saver import Saver, pointed
from nanovllm_core.weights import ModelFolder

IDENTITY = "a training loop of its own"
CONFIG = "training_config.json"


class CheckpointManager:
    """Saves `checkpoint-<step>` folders under `output_dir`, which open like any model folder.

    save_total_limit: the newest that are kept, beside the best; None keeps all
    """

    def __init__(self, output_dir: str | Path, save_total_limit: int | None = 3) -> None:
        self.root, self.limit = Path(output_dir), save_total_limit

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        tokenizer: Any = None,
        step: int = 0,
        epoch: float = 0,
        loss: float = math.nan,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        is_best: bool = False,
    ) -> Path:
        """Write a checkpoint and return when it is on the disk; the folder.

        model: of ours or of transformers; optimizer: AdamW; `is_best`: kept until another one is, and `best` leads to it.
        Checkpoints of a run in the same folder are left alone. Raises OutputError when it cannot be written (what was saved
        before is untouched), CheckpointError for what could not be loaded back.
        """
        own, name = self._loadable(model, optimizer, tokenizer, step), f"checkpoint-{step}"
        told = config.given if isinstance(config, TrainingConfig) else dict(config or {})
        self.root.mkdir(parents=True, exist_ok=True)
        finite = {"eval_loss": float(loss)} if math.isfinite(loss) else {}
        state = State(
            step=step,
            position=0,
            total_steps=step,
            identity=IDENTITY,
            tokenizer=own.fingerprint,
            metrics={"epoch": float(epoch), **finite},
            before={},
            random=[checkpoint.random_state()],
            evaluated=False,  # the best is what the caller says
            progress={
                "optimizer": {"lr": [float(group["lr"]) for group in optimizer.param_groups]},
                **({"scheduler": _numbers(scheduler.state_dict())} if scheduler is not None else {}),
            },
        )

        def rest(folder: Path) -> None:
            write_config(folder, _config(model), own, str(next(model.parameters()).dtype).removeprefix("torch."))
            (folder / CONFIG).write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")

        saver = Saver(
            root=self.root, limit=self.limit, write_rest=rest, saved=lambda s, p: None, free=lambda: 0, mine=_mine
        )
        before = self.best
        saver.best = name if is_best else None if before is None else before.name
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        frozen = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if not p.requires_grad}

        def held(copy: bool) -> Snapshot:
            made = snapshot(trained, optimizer, copy)
            return evolve(made, weights={**made.weights, **frozen}, owners={**made.owners, **dict.fromkeys(frozen, 0)})

        saver.save(state, held, 0)
        saver.finish()
        return self.root / name

    def _loadable(self, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any, step: int) -> Tokenizer:
        """The tokenizer, where a checkpoint of these could be loaded back. Raises CheckpointError."""
        if tokenizer is None:
            raise CheckpointError("save_checkpoint: a checkpoint opens as a model, so it needs the tokenizer")
        own, rows = ready(tokenizer), _config(model).get("vocab_size", 0)
        if own.vocab_size > rows:
            raise CheckpointError(f"save_checkpoint: the tokenizer has {own.vocab_size} ids and the model {rows}")
        if {key for state in optimizer.state.values() for key in state} - set(KEYS):
            raise CheckpointError(
                f"save_checkpoint: optimizer: got {type(optimizer).__name__}, whose state a checkpoint does not hold; use "
                "create_optimizer, or torch.optim.AdamW"
            )
        if lost := untrained(((n, p) for n, p in model.named_parameters() if p.requires_grad), optimizer):
            raise CheckpointError(
                f"save_checkpoint: the optimizer does not train {lost[0]}; set requires_grad to False there"
            )
        there = self.root / f"checkpoint-{step}"
        if there.exists() and not _mine(there):
            raise CheckpointError(f"save_checkpoint: {there} is a run's; save under another output_dir")
        return own

    @property
    def latest(self) -> Path | None:
        """The checkpoint that was saved last."""
        name = pointed(self.root)
        return None if name is None else self.root / name

    @property
    def best(self) -> Path | None:
        """The newest that was saved with `is_best`, if it is sound."""
        try:
            name = read_json(self.root / "checkpoints.json")["best"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if name is None or not _mine(self.root / str(name)) else self.root / str(name)

    def load_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        best: bool = False,
    ) -> dict[str, Any]:
        """Put back the checkpoint that was saved last (or the best), where it is damaged the newest sound one: its `step`,
        `epoch` and `loss`.

        Raises CheckpointError when there is none, or it is another model's.
        """
        folder, state = self._sound(best)
        saved = ModelFolder.open(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = saved.tensor(name)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: {name} is {list(value.shape)}, this model's {list(parameter.shape)}"
                    )
                parameter.copy_(value)
        if optimizer is not None:
            names = [name for name, _ in model.named_parameters()]
            load_optimizer(folder, optimizer, model.named_parameters(), dict.fromkeys(names, 1))
            for group, rate in zip(optimizer.param_groups, state.progress["optimizer"]["lr"], strict=True):
                group["lr"] = rate
        if scheduler is not None and "scheduler" in state.progress:
            scheduler.load_state_dict({**scheduler.state_dict(), **state.progress["scheduler"]})
        checkpoint.set_random_state(state.random[0])
        return {
            "step": state.step,
            "epoch": state.metrics.get("epoch", 0.0),
            "loss": state.metrics.get("eval_loss", math.nan),
            "path": folder,
        }

    def _sound(self, best: bool) -> tuple[Path, State]:
        folder = self.best if best else self.latest
        if folder is not None:
            try:
                return folder, checkpoint.sound(folder, IDENTITY)
            except CheckpointError:
                if best:
                    raise
        found = None if best else checkpoint.newest(self.root, lambda text: None, IDENTITY)
        if found is None:
            raise CheckpointError(f"{self.root}: no sound checkpoint that a CheckpointManager saved")
        return found


def _mine(folder: Path) -> bool:
    """Whether a CheckpointManager saved it, and not a run."""
    try:
        return checkpoint.read_state(folder).identity == IDENTITY
    except CheckpointError:
        return False


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise CheckpointError(
            f"save_checkpoint: the {type(model).__name__} has no config; give a model of ours or of transformers"
        )
    told: dict[str, Any] = config.to_dict()
    return told


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint may hold of a scheduler: numbers and lists of them."""
    plain = (bool, int, float)
    return {
        key: float(value) if isinstance(value, float) else value
        for key, value in state.items()
        if (type(value) in plain and not isinstance(value, bool))
        or (isinstance(value, list) and value and all(type(x) in (int, float) for x in value))
    }
