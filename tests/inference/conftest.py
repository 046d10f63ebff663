"""Small models with wide random weights, and the ways in which tests have them answer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from nanovllm_kernels.torch import Torch
from nanovllm_models.config import outline
from nanovllm_models.families import from_huggingface
from nanovllm_tokenizers.bpe import train

from nanovllm_core.contracts import GENERATION, OPERATIONS, Batch, KernelRequest, Ops, Shape
from nanovllm_core.inference.engine import Engine
from nanovllm_core.inference.generate import evaluating, generate
from nanovllm_core.inference.params import SamplingParams

MAX = 512
SENTENCE = "The loop against a cache-free recomputation and against transformers; the same draws in any company."
TEXTS = [SENTENCE, *(f"Was für ein Tag, {i} Äpfel für Zoë – 漢字 und 😀 in a very long line.\n" for i in range(40))]


def ops_for(shape: Shape, dtype: str) -> Ops:
    request = {"device": "cpu", "dtype": dtype, "shape": shape, "training": False}
    return Ops(
        dtype=dtype, **{op: Torch().load(KernelRequest(operation=op, **request)) for op in (*OPERATIONS, *GENERATION)}
    )


def settings_of(family: str, tied: bool) -> dict[str, Any]:
    """A small model's Hugging Face config; windows are shorter than what is read and written here."""
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": MAX}
    else:
        sizes = {
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": MAX,
        }  # fmt: skip
    windows = {
        "mistral": {"sliding_window": 11},
        "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    }
    sizes |= windows.get(family, {})
    return {"model_type": family, "vocab_size": 440, "tie_word_embeddings": tied, **sizes}


class Model:
    """A small model with wide random weights, so that its answers wander, and a tokenizer with fewer ids than rows."""

    def __init__(self, family: str, tied: bool, dtype: str = "float32", seed: int = 0) -> None:
        self.texts, self.tokenizer = TEXTS, train(TEXTS, 420)
        self.settings = settings_of(family, tied)
        config = from_huggingface(self.settings)
        self.shape = outline(config, dtype="float32")
        self.module = config.build(ops_for(self.shape, dtype))
        self.module.to_empty(device="cpu")
        g = torch.Generator().manual_seed(seed)
        for parameter in self.module.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.35, generator=g)
        self.module.to(getattr(torch, dtype))

    def __call__(self, prompts, params, most=32, max_len=MAX):
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        return generate(
            self.module,
            self.tokenizer,
            prompts,
            many,
            shape=self.shape,
            device="cpu",
            max_len=max_len,
            most=most,
        )

    def engine(self, **settings: Any) -> Engine:
        """An engine over few, small pages; of `settings`, as `Engine` takes them."""
        settings = {"max_len": MAX, "pages": 400, "page_size": 4, "most": 16, "budget": 64} | settings
        return Engine(self.module, self.tokenizer, self.shape, "cpu", **settings)

    def ran(self, engine: Engine, prompts: Any, params: Any) -> list[dict[str, Any]]:
        """All answers by an engine."""
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        answers = [s for sequences in engine.answers(prompts, many) for s in sequences]
        engine.enqueue(answers)
        with evaluating(self.module):
            while engine.busy:
                engine.step()
        return [s.output(self.tokenizer) for s in answers]

    @torch.no_grad()
    def recomputed(self, ids: list[int], n: int) -> list[int]:
        """Greedy without any cache: the whole sequence again for each token."""
        ids, begin = list(ids), len(ids)
        while len(ids) < begin + n and (len(ids) == begin or ids[-1] not in self.tokenizer.stop_ids):
            batch = Batch(
                positions=torch.arange(len(ids)),
                lengths=(len(ids),),
                cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
                select=torch.tensor([len(ids) - 1]),
            )
            ids.append(int(self.module(torch.tensor(ids), batch)[0, : self.tokenizer.vocab_size].argmax()))
        return ids[begin:]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: more threads only wait for each other, for minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    scope="module",
    params=[("qwen3", True), ("mistral", False)],
    ids=["qwen3-tied", "mistral"],
)
def model(request) -> Model:
    return Model(*request.param)


@pytest.fixture(scope="session")
def make_model() -> type[Model]:
    """(family, tied, dtype, seed) -> a model."""
    return Model


@pytest.fixture(scope="session")
def prompts_of():  # type: ignore[no-untyped-def]
    """(n, longest, seed) -> random prompts."""

    def make(n: int, longest: int, seed: int = 0) -> list[list[int]]:
        pick = random.Random(seed)
        return [[pick.randrange(2, 420) for _ in range(pick.randint(1, longest))] for _ in range(n)]

    return make
