"""`plan.lock.json`: what a run was made of; and the identity that tells whether a folder holds the same run."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from typing import Any

from nanovllm_core import hub
from nanovllm_core.negotiate import Candidate, Choice
from nanovllm_core.options import model_refs, public, without_secrets
from nanovllm_core.plan import Plan

# What changes the trained weights, and so the identity. Left out on purpose: how long (a patience too: a longer one goes
# on), how often something is said or saved, where it runs and by which kernels, gradient_checkpointing (which computes the
# same values again), and versions: an update goes on with a run (its lock says what changed). spike_factor says which steps
# are taken; on_bad_step and max_bad_steps do not count: before the first bad step they change nothing, and a run that
# stopped at one must be able to go on and skip it.
DATA_KEYS = ("max_seq_length", "concatenate_documents", "document_separator", "min_chunk_size", "eval_fraction")
TRAIN_KEYS = (
    "learning_rate", "weight_decay", "beta1", "beta2", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "decay_ratio",
    "decay_shape", "mixed_precision", "gradient_clipping", "freeze", "unfreeze", "unfreeze_blocks_every", "spike_factor",
    "seed",
)  # fmt: skip


def reading(plan: Plan, *, versions: bool) -> dict[str, Any]:
    """What makes documents of the sources, besides their content: who reads which, and how, and who extracts."""
    data = plan.data
    used = sorted((c for c in data.readers if data.taken.get(c.entry.full_name)), key=lambda c: c.entry.full_name)
    return {
        "assignment": data.assignment,
        "readers": [_described(c, versions=versions) for c in used],
        "extractors": [_described(c, versions=versions) for c in data.extractors if not c.unusable],
    }


def identity(plan: Plan, data_fingerprint: str, progress: Callable[[int, int], None] | None = None) -> str:
    """sha256 over data, tokenizer, model and optimisation: equal for runs that would train the same weights.

    Components count by their options' values, however the recipe spells them, and named models by their content.
    """
    data, train = plan.recipe.data, plan.recipe.to_data()["train"]
    parts = {
        "documents": data_fingerprint,
        "data": {key: getattr(data, key) for key in DATA_KEYS} | {"chunk_overlap": plan.chunk_overlap.value},
        "reading": reading(plan, versions=False),
        "tokenizer": _with_content(plan.model.tokenizer, False, progress),
        "model": _with_content(plan.model.model, True, progress),
        "train": {key: train[key] for key in TRAIN_KEYS} | {"global_batch": sequences_per_step(plan)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _with_content(choice: Choice, weights: bool, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    told = _described(choice, versions=False)
    for name, value in model_refs(choice.component):
        told["options"][name] = hub.fingerprint(value, weights=weights, progress=progress)
    return told


def sequences_per_step(plan: Plan) -> int:
    """Sequences in an optimizer step over all data ranks."""
    train = plan.recipe.train
    if train.global_batch_size is not None:
        return train.global_batch_size
    replicas = plan.model.layout.data * plan.model.layout.shard
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * replicas


def _described(item: Choice | Candidate, *, versions: bool = True) -> dict[str, Any]:
    """A component as it was chosen, with the value of every option."""
    told: dict[str, Any] = {"use": item.entry.full_name, "options": public(item.component)}
    return told | {"version": item.entry.version} if versions else told


def lock_of(plan: Plan, identity: str, data_fingerprint: str) -> dict[str, Any]:
    """What `plan.lock.json` holds."""
    from importlib.metadata import version

    import torch

    return {
        "identity": identity,
        "components": {c.slot: _described(c) for c in plan.model.choices}
        | {
            kind: [_described(c) for c in candidates if not c.unusable]
            for kind, candidates in (
                ("data.readers", plan.data.readers),
                ("data.extractors", plan.data.extractors),
                ("callbacks", plan.callbacks),
            )
        },
        "versions": {name: version(name) for name in ("nanovllm", "transformers", "tokenizers")}
        | {"torch": torch.__version__, "python": platform.python_version()},  # torch names its build here alone
        "device": {
            "kind": plan.machine.device,
            "name": plan.machine.device_name,
            "world_size": plan.machine.world_size,
        },
        "compute_dtype": plan.model.dtype,
        "vocabulary": plan.model.vocabulary.value,
        "parameters": plan.model.shape.parameters,
        "data": {"sha256": data_fingerprint, "files": plan.data.documents.files, "bytes": plan.data.documents.bytes},
        "recipe_sha256": hashlib.sha256(plan.recipe.to_yaml().encode()).hexdigest(),
        "recipe": without_secrets(plan.recipe.to_data()),
    }
