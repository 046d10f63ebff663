"""linear_cross_entropy against its float64 definition: values, gradients, ignored targets, chunks, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nanovllm_kernels import torch_loss
from nanovllm_kernels.torch_loss import linear_cross_entropy
from torch import Tensor

from nanovllm_core.contracts import IGNORE, Ops

MakeOps = Callable[[str], Ops]
SIZES = [(1, 2, 1), (5, 7, 3), (129, 97, 33), (64, 1000, 16)]  # tokens, vocabulary, hidden


@pytest.fixture(params=["one chunk", "chunks of 3 rows"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setattr(torch_loss, "MIN_ROWS", 1)
        monkeypatch.setattr(torch_loss, "MAX_ROWS", 3)


def targets_with_ignored(t: int, v: int, share: float) -> Tensor:
    return torch.where(torch.rand(t) < share, IGNORE, torch.randint(0, v, (t,)))


def loss_64(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = x @ weight.T
    kept = targets != IGNORE
    return (logits.logsumexp(-1) - logits.gather(1, targets.clamp_min(0)[:, None])[:, 0])[kept].sum()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("t", "v", "c"), SIZES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_value_and_gradients(
    make_ops: MakeOps, t: int, v: int, c: int, share: float, dtype: str, tolerance: float
) -> None:
    x = torch.randn(t, c).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(v, c, requires_grad=True)
    targets = targets_with_ignored(t, v, share)
    loss = make_ops(dtype).linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    (loss * 0.37).backward()
    x_64, weight_64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = loss_64(x_64, weight_64, targets)
    (wanted * 0.37).backward()
    assert abs(float(loss.detach()) - float(wanted.detach())) <= tolerance * max(1.0, abs(float(wanted.detach())))
    for given, reference, factor in ((x, x_64, weight_64), (weight, weight_64, x_64)):
        assert given.grad is not None
        assert reference.grad is not None
        assert given.grad.dtype == given.dtype
        error = (given.grad.double() - reference.grad).abs().max()
        assert error <= tolerance * max(reference.grad.abs().max(), factor.detach().abs().max())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradcheck(share: float) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = targets_with_ignored(7, 5, share)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, weight))
    assert torch.autograd.gradcheck(lambda a: linear_cross_entropy(a, weight.detach(), targets), (x,))
    assert torch.autograd.gradcheck(lambda b: linear_cross_entropy(x.detach(), b, targets), (weight,))


def test_equals_torch_cross_entropy_at_extremes() -> None:
    """Logits in the hundreds: the probability of the target underflows, its logarithm must not."""
    x, weight = torch.randn(40, 16) * 30, torch.randn(50, 16) * 3
    targets = targets_with_ignored(40, 50, 0.2)
    wanted = torch.nn.functional.cross_entropy(x.double() @ weight.double().T, targets, reduction="sum")
    assert float(linear_cross_entropy(x, weight, targets)) == pytest.approx(float(wanted), rel=1e-5)


def test_bf16_sum_is_fp32() -> None:
    """4,000 equal losses: a bf16 sum would stop at 2,048 terms or so."""
    x, weight = torch.zeros(4000, 8, dtype=torch.bfloat16), torch.randn(10, 8)
    loss = linear_cross_entropy(x, weight, torch.zeros(4000, dtype=torch.int64))
    assert float(loss) == pytest.approx(4000 * torch.tensor(10.0).log().item(), rel=1e-5)


def test_retained_graphs_give_the_same_gradient_again() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.randint(0, 9, (6,)))
    first = torch.autograd.grad(loss * 2, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 2, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_makes_no_gradients() -> None:
    x, weight = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    with torch.inference_mode():
        assert not linear_cross_entropy(x, weight, torch.randint(0, 9, (6,))).requires_grad


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: made.append(size[0] * size[1]) or real(*size, **kw))
    t, v = 4096, 8192
    x, weight = torch.randn(t, 2, requires_grad=True), torch.randn(v, 2, requires_grad=True)
    linear_cross_entropy(x, weight, torch.randint(0, v, (t,))).backward()
    assert made
    assert max(made) <= t * v / 16


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(9, 4), torch.randint(0, 9, (6,)))
    (grad,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
