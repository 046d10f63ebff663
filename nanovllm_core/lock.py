"""`plan.lock.json`: what a run was made of; and the identity that tells whether a folder holds the same run."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

from nanovllm_core.plan import Plan
from nanovllm_core.recipe import Component

# What changes the trained weights, and so the identity. Left out on purpose: how long, how often something is said or
# saved, where it runs and by which kernels.
DATA_KEYS = ("max_seq_length", "concatenate_documents", "document_separator", "min_chunk_size", "eval_fraction")
TRAIN_KEYS = (
    "learning_rate", "weight_decay", "beta1", "beta2", "lr_scheduler_type", "warmup_steps", "mixed_precision",
    "gradient_clipping", "seed",
)  # fmt: skip


def identity(plan: Plan, data_fingerprint: str) -> str:
    """sha256 over data, tokenizer, model and optimisation keys: equal for runs that would train the same weights."""
    recipe, data, train = plan.recipe, plan.recipe.data, plan.recipe.train
    parts = {
        "documents": data_fingerprint,
        "data": {key: getattr(data, key) for key in DATA_KEYS} | {"chunk_overlap": plan.chunk_overlap.value},
        "readers": [_component(c) for c in data.readers],
        "extractors": [_component(c) for c in data.extractors],
        "tokenizer": _component(recipe.tokenizer),
        "model": _component(recipe.model),
        "train": {key: getattr(train, key) for key in TRAIN_KEYS} | {"global_batch": sequences_per_step(plan)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sequences_per_step(plan: Plan) -> int:
    """Sequences in an optimizer step over all data ranks."""
    train = plan.recipe.train
    if train.global_batch_size is not None:
        return train.global_batch_size
    replicas = plan.model.layout.data * plan.model.layout.shard
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * replicas


def _component(component: Component | None) -> Any:
    return None if component is None else {"use": component.use, **component.options}


def lock_of(plan: Plan, data_fingerprint: str) -> dict[str, Any]:
    """What `plan.lock.json` holds."""
    from importlib.metadata import version

    import torch

    slots = {
        c.slot: {"use": c.entry.name, "distribution": c.entry.distribution, "version": c.entry.version}
        for c in plan.model.choices
    }
    readers = {
        f"{kind}.{c.entry.name}": {"distribution": c.entry.distribution, "version": c.entry.version}
        for kind, candidates in (("readers", plan.data.readers), ("extractors", plan.data.extractors))
        for c in candidates
    }
    return {
        "identity": identity(plan, data_fingerprint),
        "components": slots | readers,
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
        "recipe": plan.recipe.to_data(),
    }
