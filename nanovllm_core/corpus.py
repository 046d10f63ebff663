"""From a plan's documents to the batches of a run: vocabulary, split, tokens, windows, sequences."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from nanovllm_core.assemble import tokenizer_of
from nanovllm_core.contracts import Tokenizer
from nanovllm_core.data.batches import Batches
from nanovllm_core.data.chunks import Chunks
from nanovllm_core.data.held_out import HeldOut
from nanovllm_core.data.ledger import Counts
from nanovllm_core.data.packing import Packing, pack
from nanovllm_core.data.split import held_out, kept
from nanovllm_core.data.store import Store, known, open_or_build
from nanovllm_core.errors import DataError
from nanovllm_core.files import MANIFEST, damage, writing, written_whole
from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.lock import reading, with_content
from nanovllm_core.plan import Plan
from nanovllm_core.training.evaluate import Evaluation

LEDGER = "skipped.jsonl"
FORWARD = 3  # a training step is about three times the work of a forward


@frozen(kw_only=True, eq=False)
class Corpus:
    """The documents of a run, tokenised, cut and packed."""

    tokenizer: Tokenizer
    chunks: Chunks
    packing: Packing
    evaluation: Evaluation | None


@frozen(eq=False)
class Found:
    """What a walk over all documents met."""

    counts: Counts
    contents: NDArray[np.uint64]  # the hash of each document's text


def count(plan: Plan, fingerprint: str, folder: Path, events: Callbacks) -> Found:
    """What documents there are: one walk over all of them, unless the store in `folder` remembers.

    Raises DataError at bad input beyond what the recipe allows, or when there is no document.
    """
    documents = plan.data.documents
    with phase(events, "reading") as tell:
        remembered = known(folder, _key(plan, fingerprint))
        if remembered and remembered[0].within(documents.allow):
            found = Found(*remembered)
        else:
            counts = documents.count(tell)
            found = Found(counts, np.array(documents.contents, np.uint64))
    counts = found.counts
    skipped = "".join(f", {n:,} skipped ({why})" for why, n in counts.skipped.items())
    skipped += f"; left out with unreadable files: {counts.loss}" if counts.loss else ""
    copies = counts.documents - len(np.unique(found.contents))
    events.note(
        text=f"{counts.documents:,} documents in {documents.files:,} files, {counts.characters:,} characters{skipped}"
    )
    if copies:
        events.note(
            text=f"{copies:,} documents are exact copies of others; copies are never on both sides of the evaluation split"
        )
    return found


def _key(plan: Plan, fingerprint: str) -> str:
    """Changes whenever the documents may."""
    return hashlib.sha256(json.dumps([fingerprint, reading(plan, versions=True)]).encode()).hexdigest()


def prepare(
    plan: Plan,
    fingerprint: str,
    named: Mapping[str, str],
    found: Found,
    folder: Path,
    events: Callbacks,
    *,
    publish: bool = True,
) -> Corpus:
    """Everything between the documents that were found and batches; tokens and a vocabulary are kept in `folder` and found
    again. What was skipped is listed in `skipped.jsonl` in the output folder, if this process is to `publish` it.

    Raises DataError when there is nothing to train on.
    """
    documents, data, seed = plan.data.documents, plan.recipe.data, plan.recipe.train.seed
    if data.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(data.workers)  # the tokenizers library reads it when it first encodes
    count = found.counts.documents
    out = held_out(found.contents, data.eval_fraction, seed)
    with phase(events, "building the vocabulary") as tell:
        key = [_key(plan, fingerprint), with_content(plan.model.tokenizer, named), plan.model.vocabulary.value]
        tokenizer = _tokenizer(plan, [*key, out.tobytes().hex()], folder, out, count, tell)
    with phase(events, "tokenising") as tell:
        store = open_or_build(folder, _key(plan, fingerprint), documents, tokenizer, tell)
    if publish:
        _publish_ledger(store, plan.output_dir / LEDGER)
    chunks = _chunks(plan, store, tokenizer, kept(count, out))
    packing = pack(chunks.lengths, data.max_seq_length, seed)
    if not len(packing):
        raise DataError(f"{data.path}: no document has two tokens or more, so there is nothing to learn from")
    events.note(
        text=f"{store.meta['tokens']:,} tokens; {len(chunks):,} windows of at most {data.max_seq_length} tokens (half of them "
        f"at most {int(np.median(chunks.lengths))}) packed into {len(packing):,} sequences, {packing.fill:.1%} full"
    )
    return Corpus(
        tokenizer=tokenizer,
        chunks=chunks,
        packing=packing,
        evaluation=_evaluation(plan, store, tokenizer, out, count, events),
    )


def _tokenizer(
    plan: Plan, key: list[Any], folder: Path, out: NDArray[np.int64], count: int, tell: Callable[[int, int], None]
) -> Tokenizer:
    """The tokenizer: as an earlier run of the same made it, or made now of all documents but those held out."""
    absent = np.zeros(count, bool)
    absent[out] = True
    model = plan.model
    place = folder / f"tokenizer-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"

    def make(kept: Path) -> Tokenizer:
        return tokenizer_of(model, lambda: plan.data.documents.texts(lambda n: bool(absent[n]), tell), kept)

    if damage(place) is None:
        return make(place)
    for old in folder.glob("tokenizer-*"):
        if (old / MANIFEST).is_file():
            shutil.rmtree(old, ignore_errors=True)
    with writing(place), written_whole(place) as partial:
        return make(partial)


def _publish_ledger(store: Store, place: Path) -> None:
    """A copy of the store's ledger where the user looks for it, or none when nothing was skipped."""
    place.unlink(missing_ok=True)
    if store.counts.skipped:
        with writing(place):
            shutil.copyfile(store.folder / "skipped.jsonl", place)


def _chunks(plan: Plan, store: Store, tokenizer: Tokenizer, numbers: Any) -> Chunks:
    data = plan.recipe.data
    return Chunks(
        store,
        numbers,
        length=data.max_seq_length,
        overlap=plan.chunk_overlap.value,
        minimum=data.min_chunk_size,
        separator=tokenizer.encode([data.document_separator])[0] if data.concatenate_documents else None,
        train_on_overlap=data.train_on_overlap,
    )


def _measured(store: Store, out: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """Of the held-out documents those that are measured: by their content's hash, so names and order do not matter."""
    if limit is None:
        return out
    order = out[np.argsort(store.contents[out], kind="stable")]
    whole = np.cumsum(store.documents["length"][order])
    return np.sort(order[: max(1, int(np.searchsorted(whole, limit, side="right")))])


def _evaluation(
    plan: Plan, store: Store, tokenizer: Tokenizer, out: Any, count: int, events: Callbacks
) -> Evaluation | None:
    if not len(out):
        why = "data.eval_fraction is 0" if count > 1 else "a single document is not split"
        events.note(text=f"evaluation is off: {why}")
        return None
    chunks = _chunks(plan, store, tokenizer, _measured(store, out, plan.recipe.data.eval_max_tokens))
    if not len(chunks):
        events.note(text="evaluation is off: the held-out documents have no token to predict")
        return None
    tokens, train = int(chunks.lengths.sum(dtype=np.int64)), plan.recipe.train
    events.note(
        text=f"{len(out):,} of the documents are held out to measure what is learned ({chunks.text_bytes:,} bytes, {tokens:,} "
        "tokens an evaluation)"
    )
    between = min(train.eval_steps, train.save_steps)
    if tokens > FORWARD * between * plan.sequences_per_step.value * plan.recipe.data.max_seq_length:
        events.note(
            text=f"an evaluation every {between} steps takes longer than these steps: raise train.eval_steps and "
            "train.save_steps, or lower data.eval_max_tokens"
        )
    rows, device = plan.recipe.train.per_device_train_batch_size, plan.machine.device
    held = HeldOut(chunks, capacity=plan.recipe.data.max_seq_length, rows=rows)
    return Evaluation(
        batches=lambda rank, size: held.batches(rank=rank, world=size, device=device), table=held.table, turns=len(held)
    )


def batches(plan: Plan, corpus: Corpus, rows_per_step: int, rank: int, world: int) -> Batches:
    """The training batches of one data rank."""
    train = plan.recipe.train
    return Batches(
        corpus.chunks,
        corpus.packing,
        seed=train.seed,
        rows_per_step=rows_per_step,
        rows=train.per_device_train_batch_size,
        epochs=train.num_train_epochs if train.max_steps is None else None,
        rank=rank,
        world=world,
        device=plan.machine.device,
        ordered=plan.model.layout.ordered,
    )


@contextmanager
def phase(events: Callbacks, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress function in bytes that tells the callbacks; that the phase is over, only at the end of the block."""
    whole = None

    def tell(done: int, total: int) -> None:
        nonlocal whole
        whole = total
        if done < total:
            events.phase_progress(phase=name, done=done, total=total, unit="bytes")

    yield tell
    if whole is not None:
        events.phase_progress(phase=name, done=whole, total=whole, unit="bytes")
