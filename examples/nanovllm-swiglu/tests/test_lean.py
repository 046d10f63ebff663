"""The kernel, by nano-vllm's conformance kit; then what it keeps, and what it refuses."""

import pytest
import torch
from nanovllm_swiglu.component import Lean
from nanovllm_swiglu.lean import swiglu

from nanovllm_core import Registry
from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Shape
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Kernels
from nanovllm_core.testing import KernelContract


def request(**change):
    shape = Shape(
        family="a", vocab_size=9, layers=1, hidden=8, tied=True, max_positions=9, parameters=9, operations=("swiglu",)
    )
    return KernelRequest(**{"operation": "swiglu", "device": "cpu", "dtype": "float32", "shape": shape, **change})


REGISTRY = Registry.from_environment()
KERNELS = bind(Kernels, [("torch", REGISTRY.load(REGISTRY.find("kernels", "torch"))())])  # the reference


class TestLean(KernelContract):
    component = Lean()
    operations = ("swiglu",)
    devices = ("cpu",)


def kept(function):
    """How many activations `function(gate, up)` and a linear layer behind it keep for the backward."""
    torch.manual_seed(0)
    gate, up = (torch.randn(64, 96, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, 96, requires_grad=True)
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        torch.nn.functional.linear(function(gate, up), weight).sum()
    held.pop(weight.untyped_storage().data_ptr())
    return sum(held.values()) / (gate.numel() * gate.element_size())


def test_keeps_two_activations_where_the_reference_keeps_three():
    assert kept(swiglu) == 2
    assert kept(KERNELS.load(request=request())) == 3


def gradients(function, gate, up, grad):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = function(gate, up)
    out.backward(grad)
    return out.detach(), gate.grad, up.grad


@pytest.mark.parametrize("zeros", [0, 3, 90])
def test_lost_products_are_no_lost_gradients(zeros):
    """Zeros, underflows and overflows of silu, few and many."""
    torch.manual_seed(zeros)
    gate, up, grad = (torch.randn(4, 25) for _ in range(3))
    odd = torch.tensor([0.0, -0.0, -120.0, 120.0, 1e-30, -88.0])
    for values in (gate, up):
        places = torch.randperm(100)[:zeros]
        values.view(-1)[places] = odd[torch.arange(zeros) % len(odd)]
    wide = gradients(lambda g, u: torch.nn.functional.silu(g) * u, gate.double(), up.double(), grad.double())
    for got, wanted in zip(gradients(swiglu, gate, up, grad), wide, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), wanted, rtol=3e-6, atol=1e-6)


def test_refuses_with_a_reason_what_it_is_not_made_for():
    assert Lean().probe(request()) == Accept(1, "keeps one activation instead of two")
    for change, why in (
        ({"operation": "gelu"}, "swiglu alone"),
        ({"device": "cuda"}, "cuda"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"training": False}, "training"),
    ):
        answer = Lean().probe(request(**change))
        assert isinstance(answer, Refuse)
        assert why in answer.why
