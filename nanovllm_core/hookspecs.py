"""The seven kinds of plugin: the one file that a plugin author reads.

A component is one frozen attrs class, named by an entry point in its kind's group:

    [project.entry-points."nanovllm.readers"]
    markdown = "my_package.reader:Markdown"

    @frozen(kw_only=True, eq=False)
    class Markdown:
        \"\"\"Markdown files, one document each.\"\"\"          # first line: its summary in `nanovllm plugins`
        keep_links: bool = True                            # fields: its options in a recipe

        @hookimpl
        def probe(self, source): ...
        @hookimpl
        def read(self, source): ...

Specs change by a new number in `LEVELS`, one for each kind. A component is written for one level, and says so once that
is no longer 1: `nanovllm_api: ClassVar[int] = 2` (without the annotation `ClassVar` it would be an option). A core takes
just its own level; any other is shown by `nanovllm plugins` as broken, with what to install. Within a level nothing
that a component relies on changes: no hook or argument goes, none that is required comes.

Hooks take plain positional arguments, by the names below (leave out those you do not need). Heavy imports (torch,
transformers, numpy) stand inside methods, so that listing plugins stays instant. Except for callbacks every hook is
required and answers with a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from nanovllm_core.contracts import (
    Damage,
    Decision,
    Document,
    KernelRequest,
    Layout,
    Module,
    Ops,
    Parallelized,
    ParallelRequest,
    Record,
    Shape,
    Source,
    Tokenizer,
    Verdict,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from nanovllm_core.plan import Plan

PROJECT = "nanovllm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Readers:
    """Turn a source into records."""

    @hookspec(firstresult=True)
    def probe(self, source: Source) -> Verdict:
        """Can this reader open the source? Judge by name and, if need be, first bytes; never read it whole."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def read(self, source: Source) -> Iterator[Record | Damage]:
        """The source's records, in order. Return an iterator (a generator made by another function), do not yield.

        For a record that cannot be read, raise DataError, which ends the source; or, where the next one can still be
        found, give a `Damage` and go on. The recipe's `data.on_error` decides what becomes of either; what is lost with
        the rest of a source counts in bytes, from the last record's `byte` or where a last `Damage` says that it
        `begins`. `data.opening` opens compressed files and tells encodings.
        """
        raise NotImplementedError


class Extractors:
    """Turn a record into a document."""

    @hookspec(firstresult=True)
    def extract(self, record: Record) -> Document | None:
        """The record's document, or None to let the next extractor try. Raise DataError when it can have none."""
        raise NotImplementedError


class Tokenizers:
    """Give a tokenizer: an existing one, or one made from the documents."""

    @hookspec(firstresult=True)
    def vocab_size(self, data_bytes: int) -> Decision:
        """How many ids the tokenizer will have, known before it is made, and why. `data_bytes`: size of all sources."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def make(self, texts: Callable[[], Iterable[str]], vocab_size: int, kept: Path | None) -> Tokenizer:
        """The tokenizer. `texts()` iterates over the training documents' text, as often as it is called; a very long text
        comes in parts.

        `kept`, if it is not None, is a folder that the core keeps for just these documents, options and size: what a
        `make` that returned has written there is there the next time, and may be opened instead of made again.
        """
        raise NotImplementedError


class Models:
    """Give a causal language model: its outline, its module, its weights, its Hugging Face configuration."""

    @hookspec(firstresult=True)
    def probe(self) -> Verdict:
        """Can this model be used here?"""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def tokenizer(self) -> Mapping[str, Any]:
        """The tokenizer component (`{"use": name, ...options}`) for a recipe that names none."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def shape(self, vocab_size: int) -> Shape:
        """The outline for a tokenizer of this size. Raise ModelError if it does not fit."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def build(self, shape: Shape, ops: Ops) -> Module:
        """The module, its parameters on `torch.device("meta")`; a buffer, if there is any, holds its value."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def weight(self, shape: Shape, name: str, seed: int) -> Tensor:
        """One parameter in full: from file, or random by seed and name alone."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def config(self, shape: Shape) -> dict[str, Any]:
        """What `config.json` of the exported folder holds."""
        raise NotImplementedError


class Kernels:
    """Give implementations of operations (`contracts.Ops` says what each must compute)."""

    @hookspec(firstresult=True)
    def probe(self, request: KernelRequest) -> Verdict:
        """Is there an implementation for this operation, device and dtype, and how good is it?"""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """The implementation."""
        raise NotImplementedError


class Parallel:
    """Spread one model over ranks."""

    @hookspec(firstresult=True)
    def probe(self, request: ParallelRequest) -> Verdict:
        """Can this strategy run here? An Accept carries its Layout."""
        raise NotImplementedError

    @hookspec(firstresult=True)
    def parallelize(self, module: Module, layout: Layout, mesh: Any) -> Parallelized:
        """Wrap a module that is still on meta. `mesh` is a torch DeviceMesh, or None on one rank."""
        raise NotImplementedError


class Callbacks:
    """Watch a run. Implement any of these; all callbacks are called; what they raise stops the run."""

    @hookspec
    def run_started(self, plan: Plan) -> None:
        """The plan is settled; nothing has been read yet."""

    @hookspec
    def note(self, text: str) -> None:
        """A sentence for the user: an automatic decision, a fact worth knowing."""

    @hookspec
    def phase_progress(self, phase: str, done: int, total: int, unit: str) -> None:
        """A phase before or beside training ("reading", "tokenising", ...) moved on. `done == total`: it is over."""

    @hookspec
    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """An optimizer step is logged (every `train.logging_steps`): loss, learning_rate, tokens_per_second, mfu, ..."""

    @hookspec
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out figures: eval_loss (nats a token), eval_perplexity, eval_bits_per_byte."""

    @hookspec
    def evaluated_by_source(self, step: int, table: Sequence[Mapping[str, Any]]) -> None:
        """The same by source, at most 100 rows: source, tokens, loss, perplexity, bits_per_byte. Most text first."""

    @hookspec
    def checkpoint_saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete on disk."""

    @hookspec
    def generated(self, step: int, prompt: str, text: str) -> None:
        """The model answered a prompt of the recipe: after a step of the training (`generate.steps`), or when it was over."""

    @hookspec
    def run_finished(self, output_dir: Path) -> None:
        """The final model is exported."""


SPECS: Mapping[str, type] = MappingProxyType(
    {
        "readers": Readers,
        "extractors": Extractors,
        "tokenizers": Tokenizers,
        "models": Models,
        "kernels": Kernels,
        "parallel": Parallel,
        "callbacks": Callbacks,
    }
)
"""Kind -> spec class. The kind is also the entry-point group's last word: `nanovllm.<kind>`."""

LEVELS: Mapping[str, int] = MappingProxyType(dict.fromkeys(SPECS, 1))
"""Kind -> the level of its spec that this core has."""
