"""`LLM(path).generate(prompts, SamplingParams(...))`: text from any folder that an installed model component opens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any, Literal, Self, overload

from attrs import evolve

from nanovllm_core.assemble import assemble, tokenizer_of
from nanovllm_core.chat import chat_ids
from nanovllm_core.contracts import Shape
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.driving import Driver
from nanovllm_core.inference.engine import PAGE, Engine
from nanovllm_core.inference.paged import page_bytes
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sequence import Sequence as Answer
from nanovllm_core.llm_ranks import Ranks, local_shape, planned
from nanovllm_core.machine import Machine, host_memory
from nanovllm_core.registry import Registry

Prompt = str | Sequence[int]
Message = Mapping[str, str]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]
PRECISION = MappingProxyType({"auto": "auto", "float32": "fp32", "bfloat16": "bf16"})
HOST_SHARE = 0.25  # of the free memory of a host: the most that its cache may grow to
GUESSES = 8  # tokens of a step
MOST = MappingProxyType({"cpu": 64, "cuda": 256})  # answers made at once


class LLM:
    """A model ready to generate.

    path: a folder (our output or any Hugging Face one of a supported family) or a hub name
    model: the component that opens it, as in a recipe: a name, or a mapping with `use` and its options, to which the path
        is added; "auto" offers the folder to every installed model that has a `path` option
    dtype: "auto" (bfloat16 on GPU, float32 on CPU), "float32" or "bfloat16"
    kernels: as in a recipe: a component's name for all operations, or a mapping operation -> component
    max_model_len: longest prompt plus answer in tokens; None: what the model was made for, or less where the cache is small
    batch_size: answers made at once; None: 256 on a GPU, 64 on a CPU
    gpu_memory_utilization: share of a GPU's memory that weights and cache may fill
    kv_cache_tokens: room of the cache; None: what memory allows. On a CPU memory is taken as the cache fills
    tensor_parallel_size: processes that hold the model together, each with a slice of every matrix and a GPU, or a share of the
        CPU's cores; this one starts the others, which end with it, or with `close`. Components come from the environment then
    prompt_lookup: most tokens of a step that are guessed from what followed the same words before; each is checked, so answers
        stay what they are, and texts that repeat come faster. None: 8; 0: none. Only on a CPU in one process
    enforce_eager: do not run decoding from recordings (CUDA graphs), which takes a moment and some memory for each number of
        answers at once; on a CPU there are none

    Raises RefusedError or ModelError when the folder cannot be used.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        model: Any = "auto",
        dtype: str = "auto",
        kernels: Any = "auto",
        max_model_len: int | None = None,
        batch_size: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        prompt_lookup: int | None = None,
        enforce_eager: bool = False,
        registry: Registry | None = None,
        machine: Machine | None = None,
    ) -> None:
        if dtype not in PRECISION:
            raise GenerationError(f"LLM: dtype: got {dtype!r}, allowed: {', '.join(PRECISION)}")
        numbers = {
            "batch_size": batch_size, "kv_cache_tokens": kv_cache_tokens, "max_model_len": max_model_len,
            "prompt_lookup": prompt_lookup,
        }  # fmt: skip
        for name, value in {**numbers, "tensor_parallel_size": tensor_parallel_size}.items():
            least = 0 if name in ("max_model_len", "prompt_lookup") else 1
            none = name in numbers
            good = none if value is None else isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not good:
                from_ = 1 if name == "max_model_len" else least  # of which the model says more
                raise GenerationError(f"LLM: {name}: got {value!r}, allowed: {'None, or ' * none}{from_} and more")
        if not isinstance(path, str | PathLike):
            raise GenerationError(f"LLM: path: got {path!r:.60}, allowed: a folder, or a name on the hub")
        if not isinstance(enforce_eager, bool):
            raise GenerationError(f"LLM: enforce_eager: got {enforce_eager!r:.60}, allowed: True or False")
        if tensor_parallel_size > 1 and (registry is not None or machine is not None):
            raise GenerationError(
                "LLM: tensor_parallel_size: the other processes know no registry and machine of yours; leave them out"
            )
        if not isinstance(gpu_memory_utilization, int | float) or not 0 < gpu_memory_utilization <= 1:
            raise GenerationError(
                f"LLM: gpu_memory_utilization: got {gpu_memory_utilization!r}, allowed: above 0 and at most 1"
            )
        recipe = {
            "model": {**(model if isinstance(model, Mapping) else {"use": model}), "path": fspath(path)},
            "kernels": kernels,
            "train": {"mixed_precision": PRECISION[dtype]},
        }
        self.machine = machine or Machine.detect()
        if tensor_parallel_size > 1:
            self.machine = evolve(self.machine, world_size=tensor_parallel_size)
        self.plan = planned(recipe, registry or Registry.from_environment(), self.machine)
        limit = self.plan.shape.max_positions
        if max_model_len is not None and not 1 <= max_model_len <= limit:
            raise GenerationError(f"LLM: max_model_len: got {max_model_len}, the model takes 1 to {limit}")
        self.tokenizer = tokenizer_of(self.plan, lambda: ())
        device, size = self.machine.device, tensor_parallel_size
        self._ranks = Ranks.start(recipe, size, self.machine.cores) if size > 1 else None
        mesh = self._ranks.mesh(device) if self._ranks else None
        self.module = assemble(self.plan, device, seed=0, training=False, mesh=mesh).module
        shape = local_shape(self.plan.shape, size)
        self.batch_size = batch_size or MOST[self.machine.device]
        room = kv_cache_tokens or self._room(gpu_memory_utilization, shape, size)
        pages = -(-min(room, self.batch_size * limit) // PAGE)
        self.max_model_len = max_model_len or min(limit, pages * PAGE)
        self.engine = Engine(
            self.module, self.tokenizer, shape, device,
            max_len=self.max_model_len, pages=pages, most=self.batch_size, talk=self._ranks.talk if self._ranks else None,
            record=False if enforce_eager else None, guesses=GUESSES if prompt_lookup is None else prompt_lookup,
        )  # fmt: skip
        self._driver = Driver(self.engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other processes of tensor_parallel_size, if there are any; without them nothing can be generated."""
        if self._ranks is not None:
            self._ranks.end()

    @property
    def lost(self) -> bool:
        """Whether one of the processes of tensor_parallel_size has died: nothing can be generated any more."""
        return self._ranks is not None and self._ranks.talk.lost

    def _room(self, share: float, shape: Shape, ranks: int) -> int:
        """Tokens that the memory has room for beside the weights, at least one page."""
        if self.machine.device == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            spare = int(free - (1 - share) * total - 0.05 * total)  # the last: what a forward needs
        else:
            spare = int(HOST_SHARE * host_memory()) // ranks
        return max(PAGE, PAGE * (spare // max(1, page_bytes(shape, PAGE, self.plan.dtype))))

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[False] = False,
    ) -> list[dict[str, Any]]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[True],
    ) -> Iterator[dict[str, Any]]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: bool = False,
    ) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Continue each prompt (text, or token ids taken as they are).

        `sampling_params`: one for all, or one a prompt. Returns, in order, `{"text", "token_ids", "finish_reason"}`, with
        `"logprobs"` where asked for; with `n` above 1 each prompt's answers follow each other. `use_tqdm`: show a bar where
        stderr is a terminal. With `stream` an iterator of pieces as they are made: `prompt` and `index` say whose, `text` and
        `token_ids` are what is new, `finish_reason` is None before the last; leaving the iterator ends the answers.
        Raises GenerationError for a prompt that is too long or parameters that do not match.
        """
        asked = self.engine.answers(*_checked(prompts, sampling_params))
        answers = [s for sequences in asked for s in sequences]
        if stream:
            return self._driver.stream(answers)
        found: list[Any] = [None] * len(answers)

        def told(at: int) -> None:  # while the device is at work on the others
            if answers[at].finish_reason is not None:
                with suppress(Exception):  # which is for the caller below, not for whoever drives
                    found[at] = answers[at].output(self.tokenizer)

        for at, answer in enumerate(answers):
            answer.advanced = partial(told, at)
        try:
            for _ in self._shown(answers, use_tqdm):
                pass
        finally:
            for answer in answers:
                answer.advanced = None
        return [text or s.output(self.tokenizer) for text, s in zip(found, answers, strict=True)]

    @overload
    def chat(
        self,
        messages: Conversations,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[False] = False,
    ) -> list[dict[str, Any]]: ...

    @overload
    def chat(
        self,
        messages: Conversations,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[True],
    ) -> Iterator[dict[str, Any]]: ...

    def chat(
        self,
        messages: Conversations,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        stream: bool = False,
    ) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Answer a conversation, or several: lists of `{"role", "content"}`, framed by the model's own chat template.

        Returns as `generate`, with `stream` too. Raises ModelError where the model has no template, or it refuses the conversation.
        """
        single = not isinstance(messages, Sequence) or not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        asked = [chat_ids(self.tokenizer, c) for c in conversations]
        if stream:
            return self.generate(asked, sampling_params, stream=True)
        return self.generate(asked, sampling_params, use_tqdm)

    def agenerate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The pieces of the answers to one prompt, as `generate(..., stream=True)` gives them, for an event loop.

        Many may be awaited at once: they are answered together. Who leaves early, or is cancelled, ends the answers.
        """
        [prompt], [params] = _checked([prompt], [sampling_params or SamplingParams()])
        return self._driver.astream(prompt, params)

    def _shown(self, answers: list[Answer], use_tqdm: bool) -> Iterator[None]:
        """Drive until all are over, with a bar that counts them."""
        if not use_tqdm:
            yield from self._driver.run(answers)
            return
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("answers", total=len(answers))
            for _ in self._driver.run(answers):
                if console.is_terminal:
                    bar.update(task, completed=sum(1 for s in answers if s.finish_reason is not None))
                yield


def _checked(
    prompts: Prompt | Sequence[Prompt], given: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[list[Prompt], list[SamplingParams]]:
    """A prompt each, and parameters each. Raises GenerationError for what is neither."""
    single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
    )
    if not isinstance(prompts, str | Sequence) or isinstance(prompts, bytes):
        raise GenerationError(
            f"generate: prompts: got {type(prompts).__name__}, allowed: a text, token ids, or a list of these"
        )
    wanted: list[Any] = [prompts] if single else list(prompts)
    for i, prompt in enumerate(wanted):
        if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence):
            raise GenerationError(f"prompt {i}: got {type(prompt).__name__}, allowed: a text, or a list of token ids")
    params: list[Any] = [given if given is not None else SamplingParams()] * len(wanted)
    if isinstance(given, Sequence) and not isinstance(given, str):
        params = list(given)
    for one in params:
        if not isinstance(one, SamplingParams):
            raise GenerationError(
                f"generate: sampling_params: got {one!r:.60}, allowed: SamplingParams(...), or a list of them, one a prompt"
            )
    if len(params) != len(wanted):
        raise GenerationError(
            f"generate: got {len(wanted)} prompts and {len(params)} sampling parameters; give one, or one each"
        )
    return wanted, params
