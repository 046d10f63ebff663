"""embedding, linear, the norms, rotary, swiglu, gelu against float64 definitions written here, and their backwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from nanovllm_kernels import torch_ops
from torch import Tensor

from nanovllm_core.contracts import Ops

MakeOps = Callable[[str], Ops]
# Relative to the largest value: fp32 keeps 24 bits, bf16 8; a few roundings each.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
DTYPES = list(TOLERANCE)
ODD = [(1, 1, 2), (3, 1, 6), (7, 3, 10), (17, 5, 34), (130, 2, 66)]  # tokens, heads, head size


def close(given: Tensor, wanted: Tensor, dtype: str) -> None:
    assert given.shape == wanted.shape
    error = (given.double() - wanted.double()).abs().max() / wanted.abs().max().clamp_min(1e-12)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def randn(*shape: int, dtype: str = "float64") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(getattr(torch, dtype))


def rms_norm_64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm_64(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def rotary_64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    return x.double() * cos.double()[:, None] + torch.cat((-b, a), -1) * sin.double()[:, None]


def swiglu_64(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.double()
    return gate / (1 + (-gate).exp()) * up.double()


def gelu_64(x: Tensor, tanh: bool) -> Tensor:
    x = x.double()
    if tanh:
        return 0.5 * x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return 0.5 * x * (1 + (x / 2**0.5).erf())


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gives_rows_in_the_compute_dtype(make_ops: MakeOps, dtype: str) -> None:
    table = torch.randn(11, 6)
    ids = torch.tensor([3, 0, 10, 3])
    out = make_ops(dtype).embedding(ids, table)
    assert out.dtype == getattr(torch, dtype)
    close(out, table.double()[ids], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("t", "o", "i"), [(1, 1, 1), (3, 5, 7), (33, 17, 65)])
def test_linear_casts_master_weights(make_ops: MakeOps, dtype: str, bias: bool, t: int, o: int, i: int) -> None:
    x, weight, b = randn(t, i, dtype=dtype), torch.randn(o, i, requires_grad=True), torch.randn(o) if bias else None
    out = make_ops(dtype).linear(x, weight, b)
    assert out.dtype == x.dtype
    wanted = x.double() @ weight.detach().to(x.dtype).double().T + (0 if b is None else b.double())
    close(out, wanted, dtype)
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "h"), ODD)
def test_rms_norm(make_ops: MakeOps, dtype: str, t: int, n: int, h: int) -> None:
    weight = torch.randn(h)
    for x in (randn(t, h, dtype=dtype), randn(t, n, h, dtype=dtype) * 30, randn(t, h, dtype=dtype) * 1e-3):
        out = make_ops(dtype).rms_norm(x, weight, 1e-6)
        assert out.dtype == x.dtype
        close(out, rms_norm_64(x, weight, 1e-6), dtype)


def test_rms_norm_statistics_are_fp32_for_bf16(make_ops: MakeOps) -> None:
    """A mean of squares added up in bf16 stops growing at 256 equal terms; here there are 4,096."""
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert make_ops("bfloat16").rms_norm(x, torch.ones(4096), 1e-6).eq(1).all()


def test_rms_norm_of_zeros_is_zero(make_ops: MakeOps) -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    out = make_ops("float32").rms_norm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert out.eq(0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "h"), ODD)
def test_layer_norm(make_ops: MakeOps, dtype: str, t: int, n: int, h: int) -> None:
    weight, bias = torch.randn(h), torch.randn(h)
    for x in (randn(t, h, dtype=dtype), randn(t, n, h, dtype=dtype) * 30 + 7, randn(t, h, dtype=dtype) * 1e-2):
        before = x.clone()
        out = make_ops(dtype).layer_norm(x, weight, bias, 1e-5)
        assert out.dtype == x.dtype
        close(out, layer_norm_64(x, weight, bias, 1e-5), dtype)
        assert x.equal(before), "inputs are left alone"


def test_layer_norm_statistics_are_fp32_for_bf16(make_ops: MakeOps) -> None:
    """In bf16 the mean of 4,096 values near 100 is off by more than their spread."""
    x = (100 + torch.arange(4096) % 2).to(torch.bfloat16).repeat(2, 1)
    out = make_ops("bfloat16").layer_norm(x, torch.ones(4096), torch.zeros(4096), 1e-5)
    close(out, layer_norm_64(x, torch.ones(4096), torch.zeros(4096), 1e-5), "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (129, 67)])
def test_gelu(make_ops: MakeOps, dtype: str, tanh: bool, shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=dtype) * 4
    before = x.clone()
    out = make_ops(dtype).gelu(x, tanh)
    assert out.dtype == x.dtype
    close(out, gelu_64(x, tanh), dtype)
    assert x.equal(before), "inputs are left alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "h"), ODD)
def test_rotary(make_ops: MakeOps, dtype: str, t: int, n: int, h: int) -> None:
    q, k, cos, sin = randn(t, n * 2, h, dtype=dtype), randn(t, n, h, dtype=dtype), torch.randn(t, h), torch.randn(t, h)
    before = q.clone()
    out_q, out_k = make_ops(dtype).rotary(q, k, cos, sin)
    close(out_q, rotary_64(q, cos, sin), dtype)
    close(out_k, rotary_64(k, cos, sin), dtype)
    assert q.equal(before), "inputs are left alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (129, 67)])
def test_swiglu(make_ops: MakeOps, dtype: str, shape: tuple[int, int]) -> None:
    gate, up = randn(*shape, dtype=dtype) * 4, randn(*shape, dtype=dtype)
    before = gate.clone()
    close(make_ops(dtype).swiglu(gate, up), swiglu_64(gate, up), dtype)
    assert gate.equal(before), "inputs are left alone"


def test_backwards_pass_gradcheck(make_ops: MakeOps) -> None:
    ops = make_ops("float32")
    x, weight, bias = (randn(*shape).requires_grad_() for shape in ((5, 3, 6), (6,), (6,)))
    assert torch.autograd.gradcheck(partial(ops.rms_norm, eps=1e-5), (x, weight))
    assert torch.autograd.gradcheck(partial(ops.rms_norm, eps=1e-5), (x.detach()[0].requires_grad_(), weight.detach()))
    assert torch.autograd.gradcheck(partial(ops.rms_norm, eps=1e-5), (x.detach(), weight))
    q, k = randn(5, 4, 6).requires_grad_(), randn(5, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(ops.rotary, (q, k, randn(5, 6), randn(5, 6)))
    for given in ((x, weight, bias), (x.detach(), weight, bias), (x, weight.detach(), bias.detach())):
        assert torch.autograd.gradcheck(partial(ops.layer_norm, eps=1e-5), given)
    for tanh in (False, True):
        assert torch.autograd.gradcheck(partial(ops.gelu, tanh=tanh), (x,))
    gate, up = randn(5, 7).requires_grad_(), randn(5, 7).requires_grad_()
    assert torch.autograd.gradcheck(ops.swiglu, (gate, up))
    assert torch.autograd.gradcheck(ops.linear, (randn(5, 3).requires_grad_(), randn(4, 3).requires_grad_(), randn(4)))
    embedding = partial(torch_ops.embedding, torch.tensor([1, 1, 0]), dtype=torch.float64)
    assert torch.autograd.gradcheck(embedding, (randn(3, 4).requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_layouts_that_are_not_contiguous(make_ops: MakeOps, dtype: str) -> None:
    """Gradients arrive as views and expanded scalars; inputs as slices."""
    ops = make_ops(dtype)
    wide = randn(6, 3, 16, dtype=dtype).requires_grad_()
    reference = wide.detach().double().requires_grad_()
    weight = torch.randn(8)
    cos, sin = torch.randn(6, 8), torch.randn(6, 8)
    for op, op_64 in (
        (lambda x: ops.rms_norm(x, weight, 1e-6), lambda x: rms_norm_64(x, weight, 1e-6)),
        (lambda x: ops.rotary(x, x, cos, sin)[0], lambda x: rotary_64(x, cos, sin)),
        (lambda x: ops.swiglu(x, x), lambda x: swiglu_64(x, x)),
        (lambda x: ops.layer_norm(x, weight, weight, 1e-6), lambda x: layer_norm_64(x, weight, weight, 1e-6)),
        (lambda x: ops.gelu(x, True), lambda x: gelu_64(x, True)),
    ):
        factor = randn(3, 6, 8, dtype=dtype).transpose(0, 1)
        wide.grad = reference.grad = None
        (op(wide[..., 4:12]) * factor).sum().backward()
        (op_64(reference[..., 4:12]) * factor.double()).sum().backward()
        close(wide.grad, reference.grad, dtype)
        wide.grad = reference.grad = None
        op(wide[..., 4:12]).sum().backward()
        op_64(reference[..., 4:12]).sum().backward()
        close(wide.grad, reference.grad, dtype)


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "swiglu"])
def test_a_second_derivative_is_refused(make_ops: MakeOps, name: str) -> None:
    ops, x = make_ops("float32"), torch.randn(4, 2, 6, requires_grad=True)
    arguments = {
        "rms_norm": (x, torch.ones(6), 1e-6),
        "rotary": (x, x, torch.randn(4, 6), torch.randn(4, 6)),
        "swiglu": (x, x),
    }
    out = getattr(ops, name)(*arguments[name])
    out = out[0] if name == "rotary" else out
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
