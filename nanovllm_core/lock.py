"""`plan.lock.json`: what a run was made of; and the identity that tells whether a folder holds the same run.

Two locks are compared by what can change the result (`COUNTED`): components with their options and versions, the content
of named models, the libraries, kind and number of devices, compute dtype, vocabulary, documents, and the recipe's keys of
data and training. Left out: where documents and output lie, callbacks, how often something is logged, evaluated or saved,
what the finished model is asked, the device's name, and where a model lies whose content is the same.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm_core import hub
from nanovllm_core.errors import LockError, reason
from nanovllm_core.files import sibling
from nanovllm_core.negotiate import Candidate, Choice
from nanovllm_core.optimisation import Train
from nanovllm_core.options import model_refs, public, shown, without_secrets
from nanovllm_core.plan import Plan

# What changes the trained weights, and so the identity. Left out on purpose: how long (a patience too: a longer one goes
# on), how often something is said or saved, where it runs and by which kernels, gradient_checkpointing (which computes the
# same values again), and versions: an update goes on with a run (its lock says what changed). spike_factor says which steps
# are taken; on_bad_step and max_bad_steps do not count: before the first bad step they change nothing, and a run that
# stopped at one must be able to go on and skip it.
DATA_KEYS = (
    "max_seq_length", "concatenate_documents", "document_separator", "min_chunk_size", "eval_fraction", "train_on_overlap",
)  # fmt: skip
TRAIN_KEYS = (
    "learning_rate", "weight_decay", "beta1", "beta2", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "decay_ratio",
    "decay_shape", "mixed_precision", "gradient_clipping", "freeze", "unfreeze", "unfreeze_blocks_every", "spike_factor",
    "seed",
)  # fmt: skip
IF_SET = ("master_weights",)  # came later: an identity has it where it is not as ever
FORMAT = 1  # of the lock; another one is not compared
COUNTED = (
    "components", "contents", "versions", "device.kind", "device.world_size", "compute_dtype", "vocabulary", "parameters",
    "chunk_overlap", "sequences_per_step", "data.sha256", "data.assignment", "recipe.data", "recipe.train",
)  # fmt: skip
ELSEWHERE = (  # within those: what another key tells better, and what the first of several ranks does alone
    "components.callbacks", "recipe.data.path", "recipe.data.readers", "recipe.data.extractors", "recipe.data.chunk_overlap",
    "recipe.data.workers",
)  # fmt: skip
UNCOUNTED = (  # and what changes no weight, though ranks must have it alike
    *ELSEWHERE, "recipe.train.logging_steps", "recipe.train.eval_steps", "recipe.train.save_steps",
    "recipe.train.save_total_limit", "recipe.train.gradient_checkpointing", "recipe.train.rank_timeout",
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


def contents(plan: Plan, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """sha256 of each model that a component's option names, by slot and option; of a tokenizer its own files."""
    return {
        f"{choice.slot}.{name}": hub.fingerprint(value, weights=choice is plan.model.model, progress=progress)
        for choice in (plan.model.tokenizer, plan.model.model)
        for name, value in model_refs(choice.component)
    }


def identity(plan: Plan, data_fingerprint: str, named: Mapping[str, str]) -> str:
    """sha256 over data, tokenizer, model and optimisation: equal for runs that would train the same weights.

    Components count by their options' values, however the recipe spells them, and named models by their `contents`.
    """
    data, train = plan.recipe.data, plan.recipe.to_data()["train"]
    parts = {
        "documents": data_fingerprint,
        "data": {key: getattr(data, key) for key in DATA_KEYS} | {"chunk_overlap": plan.chunk_overlap.value},
        "reading": reading(plan, versions=False),
        "tokenizer": with_content(plan.model.tokenizer, named),
        "model": with_content(plan.model.model, named),
        "train": {key: train[key] for key in TRAIN_KEYS}
        | {key: train[key] for key in IF_SET if train[key] != getattr(Train(), key)}
        | {"global_batch": plan.sequences_per_step.value},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def with_content(choice: Choice, named: Mapping[str, str]) -> dict[str, Any]:
    """A component without its version; models that its options name count by their `contents`."""
    told = _described(choice, versions=False)
    for name, _ in model_refs(choice.component):
        told["options"][name] = named[f"{choice.slot}.{name}"]
    return told


def _described(item: Choice | Candidate, *, versions: bool = True) -> dict[str, Any]:
    """A component as it was chosen, with the value of every option."""
    told: dict[str, Any] = {"use": item.entry.full_name, "options": public(item.component)}
    return told | {"version": item.entry.version} if versions else told


def lock_of(plan: Plan, identity: str, data_fingerprint: str, named: Mapping[str, str]) -> dict[str, Any]:
    """What `plan.lock.json` holds."""
    from importlib.metadata import version

    import torch

    read = reading(plan, versions=True)
    return {
        "format": FORMAT,
        "identity": identity,
        "components": {c.slot: _described(c) for c in plan.model.choices}
        | {"data.readers": read["readers"], "data.extractors": read["extractors"]}
        | {"callbacks": [_described(c) for c in plan.callbacks]},
        "contents": dict(named),
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
        "chunk_overlap": plan.chunk_overlap.value,
        "sequences_per_step": plan.sequences_per_step.value,
        "data": {
            "sha256": data_fingerprint,
            "assignment": read["assignment"],
            "files": plan.data.documents.files,
            "bytes": plan.data.documents.bytes,
        },
        "recipe_sha256": hashlib.sha256(plan.recipe.to_yaml().encode()).hexdigest(),
        "recipe": without_secrets(plan.recipe.to_data()),
    }


# ---------------------------------------------------------------- two locks


def drift(there: Mapping[str, Any], here: Mapping[str, Any], uncounted: Sequence[str] = UNCOUNTED) -> list[str]:
    """What differs between two locks and can change the result: one `key: A there, B here` each, in the order of keys."""
    old, new = (dict(_counted(json.loads(json.dumps(lock)), uncounted)) for lock in (there, here))
    keys = [*old, *(key for key in new if key not in old)]
    lines = [
        f"{key}: {_said(old, key)} there, {_said(new, key)} here" for key in keys if _said(old, key) != _said(new, key)
    ]
    if not lines and there.get("identity") != here.get("identity"):
        lines.append("identity: another run, by a key that neither lock tells")
    return lines


def _counted(lock: Mapping[str, Any], uncounted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    places = [
        f"components.{slot}.options.{name}" for slot, _, name in (key.rpartition(".") for key in lock["contents"])
    ]
    for key, value in _leaves(lock, ""):
        inside = any(key == top or key.startswith(f"{top}.") for top in COUNTED)
        if inside and not any(key == out or key.startswith((f"{out}.", f"{out}[")) for out in (*uncounted, *places)):
            yield key, value


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{i}]")
    else:
        yield key, value


def _said(leaves: Mapping[str, Any], key: str) -> str:
    return shown(leaves[key]) if key in leaves else "nothing"


def refuse_drift(plan: Plan, path: Path) -> None:
    """Compare a plan with a lock before it is run. Raises LockError with each thing that differs."""
    there = read_lock(path)
    fingerprint, named = plan.data.documents.fingerprint(), contents(plan)
    lines = drift(there, lock_of(plan, identity(plan, fingerprint, named), fingerprint, named))
    if lines:
        told = "".join(f"\n  {line}" for line in lines)
        raise LockError(
            f"{path}: what would run here is not what was locked there; make it the same, or run without --locked:{told}"
        )


def read_lock(path: Path) -> dict[str, Any]:
    """The lock of a file. Raises LockError when there is none, it is damaged, or it has another format."""
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LockError(f"{path}: no such file{sibling(path)}") from None
    except OSError as e:
        raise LockError(f"{path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, RecursionError) as e:
        raise LockError(f"{path}: not a lock that a run wrote ({reason(e)})") from e
    if not isinstance(lock, dict) or "identity" not in lock:
        raise LockError(f"{path}: not a lock that a run wrote; give an output folder's plan.lock.json")
    if lock.get("format") != FORMAT or not isinstance(lock.get("contents"), dict):
        raise LockError(
            f"{path}: a lock of format {shown(lock.get('format'))}, this nanovllm compares format {FORMAT}; run once without "
            "--locked to write it anew"
        )
    return lock
