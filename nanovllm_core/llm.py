"""`LLM(path).generate(prompts, SamplingParams(...))`: text from any folder that an installed model component opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any

from nanovllm_core.assemble import assemble, tokenizer_of
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.generate import generate
from nanovllm_core.inference.sampling import SamplingParams
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry

Prompt = str | Sequence[int]
PRECISION = MappingProxyType({"auto": "auto", "float32": "fp32", "bfloat16": "bf16"})


class LLM:
    """A model ready to generate.

    path: a folder (our output or any Hugging Face one of a supported family) or a hub name
    model: the component that opens it, as in a recipe: a name, or a mapping with `use` and its options, to which the path
        is added; "auto" offers the folder to every installed model that has a `path` option
    dtype: "auto" (bfloat16 on GPU, float32 on CPU), "float32" or "bfloat16"
    kernels: as in a recipe: a component's name for all operations, or a mapping operation -> component
    max_model_len: longest prompt plus answer in tokens; None: what the model was made for
    batch_size: prompts generated together

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
        batch_size: int = 32,
        registry: Registry | None = None,
        machine: Machine | None = None,
    ) -> None:
        if dtype not in PRECISION:
            raise GenerationError(f"LLM: dtype: got {dtype!r}, allowed: {', '.join(PRECISION)}")
        recipe = Recipe.from_data(
            {
                "model": {**(model if isinstance(model, Mapping) else {"use": model}), "path": fspath(path)},
                "kernels": kernels,
                "train": {"mixed_precision": PRECISION[dtype]},
            }
        )
        self.machine = machine or Machine.detect()
        self.plan = plan_model(recipe, registry or Registry.from_environment(), self.machine, training=False)
        limit = self.plan.shape.max_positions
        if max_model_len is not None and not 1 <= max_model_len <= limit:
            raise GenerationError(f"LLM: max_model_len: got {max_model_len}, the model takes 1 to {limit}")
        self.max_model_len, self.batch_size = max_model_len or limit, batch_size
        self.tokenizer = tokenizer_of(self.plan, lambda: ())
        self.module = assemble(self.plan, self.machine.device, seed=0, training=False).module

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[dict[str, Any]]:
        """Continue each prompt (text, or token ids taken as they are).

        `sampling_params`: one for all, or one a prompt. Returns, in order, `{"text", "token_ids", "finish_reason"}`.
        Raises GenerationError for a prompt that is too long or parameters that do not match.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        wanted: list[Any] = [prompts] if single else list(prompts)
        for i, prompt in enumerate(wanted):
            if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence):
                raise GenerationError(
                    f"prompt {i}: got {type(prompt).__name__}, allowed: a text, or a list of token ids"
                )
        given = sampling_params if sampling_params is not None else SamplingParams()
        params = [given] * len(wanted) if isinstance(given, SamplingParams) else list(given)
        if len(params) != len(wanted):
            raise GenerationError(
                f"generate: got {len(wanted)} prompts and {len(params)} sampling parameters; give one, or one each"
            )
        return generate(
            self.module,
            self.tokenizer,
            wanted,
            params,
            shape=self.plan.shape,
            device=self.machine.device,
            max_len=self.max_model_len,
            batch_size=self.batch_size,
        )
