"""What stands around kernels of packed attention: here the reference takes their place. The kernels themselves need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from nanovllm_kernels.flash_attn import FlashAttn
from nanovllm_kernels.packed_attention import attention
from nanovllm_kernels.torch_varlen import TorchVarlen
from torch import Tensor

from nanovllm_core.contracts import KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.testing import KernelContract
from nanovllm_core.testing.kernel_cases import SHAPES
from nanovllm_core.testing.modelling import pack
from nanovllm_core.testing.reference import attention as defined

ASKED = KernelRequest(operation="attention", device="cuda", dtype="bfloat16", shape=SHAPES[2])


def plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None) -> Tensor:
    """Such a kernel's meaning."""
    lengths = tuple(cu_seqlens.diff().tolist())
    assert cu_seqlens.dtype == torch.int32
    assert max(lengths) == longest
    assert all(x.stride(2) == 1 for x in (q, k, v))
    return defined(q, k, v, pack(*lengths), window)


@frozen(kw_only=True, eq=False)
class Plain:
    """It as a component."""

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        from nanovllm_kernels.torch import Torch

        answer = Torch().probe(request)
        return answer if request.operation == "attention" else Refuse("attention alone")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        return partial(attention, plain)


class TestPacked(KernelContract):
    component = Plain()
    operations = ("attention",)
    devices = ("cpu",)
    shapes = SHAPES[:2]


class TestFlashAttn(KernelContract):
    component = FlashAttn()
    operations = ("attention",)
    devices = ("cuda",)


class TestTorchVarlen(KernelContract):
    component = TorchVarlen()
    operations = ("attention",)
    devices = ("cuda",)


@pytest.mark.parametrize("component", [FlashAttn(), FlashAttn(version=2), FlashAttn(version=4), TorchVarlen()])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operation": "linear"}, "attention alone"),
        ({"device": "cpu"}, "needs a CUDA device, not 'cpu'"),
        ({"dtype": "float32"}, "train.mixed_precision: bf16"),
    ],
)
def test_refuses_with_reasons(component: FlashAttn | TorchVarlen, change: dict[str, str], reason: str) -> None:
    refused = component.probe(evolve(ASKED, **change))
    assert isinstance(refused, Refuse)
    assert reason in refused.why


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they may be accepted")
def test_without_a_gpu_each_package_is_refused_by_name() -> None:
    refused = FlashAttn().probe(ASKED)
    assert isinstance(refused, Refuse)
    assert "flash-attn-4 " in refused.why
    assert "flash-attn " in refused.why
    assert "flash-attn-4" not in FlashAttn(version=2).probe(ASKED).why
    assert "compute capability 8.0" in TorchVarlen().probe(ASKED).why


@pytest.mark.parametrize(
    ("lengths", "met"), [((256, 256), True), ((512,), True), ((512, 256), False), ((255, 255), False), ((), False)]
)
def test_only_common_sizes_are_handed_to_what_builds_a_plan_for_each(lengths: tuple[int, ...], met: bool) -> None:
    from nanovllm_kernels.torch_attention import met_again, suits_cudnn

    assert met_again(lengths) == met
    assert not suits_cudnn(torch.zeros(sum(lengths), 2, 8, dtype=torch.bfloat16), lengths)  # on a CPU
