"""Models under test: built and filled as a run does it, beside the same model in transformers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovllm_kernels.torch import Torch
from torch import Tensor

from nanovllm_core.assemble import fill
from nanovllm_core.contracts import Batch, KernelRequest, Module, Ops, Shape


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own inputs, the same ones each time."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def build() -> Callable[..., Module]:
    """(component, shape, dtype) -> its module on the CPU, every parameter replaced by name as a run replaces it."""

    def make(model: Any, shape: Shape, dtype: str = "float32", seed: int = 0) -> Module:
        requests = {
            name: KernelRequest(operation=name, device="cpu", dtype=dtype, shape=shape) for name in shape.operations
        }
        ops = Ops(dtype=dtype, **{name: Torch().load(request) for name, request in requests.items()})
        module = model.build(shape, ops)
        assert all(parameter.is_meta for _, parameter in module.named_parameters())
        fill(module, lambda name: model.weight(shape, name, seed).float(), "cpu")
        return module

    return make


@pytest.fixture
def pack() -> Callable[..., Batch]:
    """Document lengths -> the batch of them."""

    def make(*lengths: int, select: Tensor | None = None) -> Batch:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])
        return Batch(positions=positions, lengths=lengths, cu_seqlens=ends.to(torch.int32), select=select)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M folder."""
    root = os.environ.get("NANOVLLM_ASSETS")
    if not root:
        pytest.skip("NANOVLLM_ASSETS is not set (python recipes/assets.py DIR makes it)")
    return Path(root) / "smollm2-135m"


@pytest.fixture
def save_transformers(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """(model_type, options) -> a random transformers model and the folder that it was saved to.

    Every parameter is random, biases and norms too, which transformers starts at zero and one.
    """

    def make(model_type: str, **options: Any) -> tuple[Any, Path]:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, **options)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        folder = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return model, folder

    return make
