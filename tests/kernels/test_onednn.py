"""The `onednn` kernels: the whole kit for generation, every way of making a product, the packed copies' lives, a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from copy import deepcopy
from weakref import ref

import pytest
import torch
from attrs import evolve
from nanovllm_kernels import onednn, onednn_products
from nanovllm_kernels.onednn import OPERATIONS, OneDnn
from nanovllm_kernels.onednn_packed import Packed
from nanovllm_kernels.onednn_products import products
from torch import Tensor

from nanovllm_core.contracts import Accept, KernelRequest, Refuse
from nanovllm_core.testing import KernelContract
from nanovllm_core.testing.kernel_cases import SHAPES

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
REQUEST = KernelRequest(operation="linear", device="cpu", dtype="float32", shape=SHAPES[0], training=False)
WAYS = [("float32", None, packs) for packs in ("none", "head", "all")] + [
    ("bfloat16", native, packs) for native in (False, True) for packs in (None, "all")
]  # dtype, whether the CPU has bf16 instructions, what is packed


class Generation(KernelContract):
    """The kit asks for training too; this component generates. With gradients on it does what the reference does."""

    operations = OPERATIONS

    def requests(self, *operations: str, training: bool = True, window: int | None = None) -> list[KernelRequest]:
        return super().requests(*operations, training=False, window=window)


class TestOneDnn(Generation):
    component = OneDnn()


class TestAllPacked(Generation):
    component = OneDnn(packed="all")


def close(found: Tensor, wanted: Tensor, dtype: str) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == getattr(torch, dtype)
    if wanted.numel():
        assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def drawn(dtype: str, *sizes: int) -> Tensor:
    with torch.inference_mode(False):  # as a model's parameters are
        return torch.randn(sizes).to(getattr(torch, dtype))


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(("dtype", "native", "packs"), WAYS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [97, 40])  # 97: the vocabulary, whose matrix is the head's
def test_linear(dtype: str, native: bool | None, packs: str | None, tokens: int, bias: bool, outputs: int) -> None:
    linear = products(dtype, SHAPES[0], packs, native).linear
    weight, b = drawn(dtype, outputs, 33), drawn(dtype, outputs) if bias else None
    flat, spread, turned = drawn(dtype, tokens, 33), drawn(dtype, tokens, 49)[:, 8:41], drawn(dtype, 33, tokens).t()
    for x in (flat, spread, turned):
        wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
        before = x.clone()
        close(linear(x, weight, b), wanted, dtype)
        assert torch.equal(x, before), "inputs are left alone"
    cubic = drawn(dtype, 2, tokens, 33)
    close(linear(cubic, weight, b), cubic.double() @ weight.double().T + (0 if b is None else b.double()), dtype)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(("dtype", "native", "packs"), WAYS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 65])
def test_norm_linear_is_its_parts(dtype: str, native: bool | None, packs: str | None, tokens: int) -> None:
    made = products(dtype, SHAPES[0], packs, native)
    x, more, norm = drawn(dtype, tokens, 33), drawn(dtype, tokens, 33), drawn(dtype, 33)
    matrices = drawn(dtype, 97, 33), None, drawn(dtype, 40, 33), drawn(dtype, 40), drawn(dtype, 7, 33), None
    for before in (None, more):
        found = made.norm_linear(x, before, norm, 1e-5, *matrices)
        total = x.double() if before is None else (x + before).double()
        normed = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.double()
        wanted = [total] + [
            normed @ w.double().T + (0 if b is None else b.double())
            for w, b in zip(matrices[::2], matrices[1::2], strict=True)
        ]
        for a, b in zip(found, wanted, strict=True):
            close(a, b, dtype)


def kept(copies: Packed) -> int:
    return sum(map(len, copies.copies.values()))


@pytest.mark.usefixtures("inference")
def test_views_of_a_weight() -> None:
    """GPT-2's matrices are views [out, in] made anew at every call: one copy is made, and changes are seen."""
    made, stored, x = products("float32", SHAPES[0], "all"), drawn("float32", 33, 33), drawn("float32", 5, 33)
    for _ in range(2):
        for _ in range(3):
            close(made.linear(x, stored.t(), None), x.double() @ stored.double(), "float32")
            close(made.linear(x, stored, None), x.double() @ stored.double().T, "float32")
            close(made.linear(x, stored[3:9], None), x.double() @ stored[3:9].double().T, "float32")
            close(made.linear(x, stored[9:15], None), x.double() @ stored[9:15].double().T, "float32")
        assert kept(made.copies) == 4
        stored.mul_(2)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("tokens", [0, 1, 16, 65])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A bf16 matrix that does not go into the fp32 memory at once."""
    monkeypatch.setattr(onednn_products, "BLOCK", 100)
    x, weight, bias = drawn("bfloat16", tokens, 33), drawn("bfloat16", 40, 33), drawn("bfloat16", 40)
    found = products("bfloat16", SHAPES[0], None, native=False).linear(x, weight, bias)
    close(found, x.double() @ weight.double().T + bias.double(), "bfloat16")


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("packs", ["none", "head", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_written_to(dtype: str, packs: str) -> None:
    linear = products(dtype, SHAPES[0], packs, native=True).linear
    x, weight = drawn(dtype, 4, 33), torch.nn.Parameter(drawn(dtype, 97, 33))
    for change in (lambda: weight.mul_(3), lambda: weight[5].zero_(), lambda: weight.copy_(drawn(dtype, 97, 33))):
        close(linear(x, weight, None), x.double() @ weight.double().T, dtype)
        change()
        close(linear(x, weight, None), x.double() @ weight.double().T, dtype)
    weight.data = drawn(dtype, 97, 33)
    close(linear(x, weight, None), x.double() @ weight.double().T, dtype)


@pytest.mark.usefixtures("inference")
def test_packed_copies_go_with_their_weights() -> None:
    copies = Packed()
    a, b, other = (drawn("float32", 97, 33) for _ in range(3))
    for matrices in ((a, None), (a, None, b, None), (a, None, other, None), (b, None), (b, None)):
        assert copies(matrices) is not None
    assert kept(copies) == 4
    a.add_(1)
    copies((a, None))
    assert kept(copies) == 4, "a new copy takes the place of the old one"
    del a, matrices
    assert kept(copies) == 1
    first = ref(copies((b, None)))
    del b
    assert kept(copies) == 0
    assert first() is None


@pytest.mark.usefixtures("inference")
def test_packed_copies_go_with_the_operations() -> None:
    made, weight = products("float32", SHAPES[0], "all"), drawn("float32", 97, 33)
    made.linear(drawn("float32", 4, 33), weight, None)
    ((copy,),) = made.copies.copies.values()
    copy = ref(copy)
    assert kept(deepcopy(made).copies) == 0
    del made
    assert copy() is None


@pytest.mark.usefixtures("inference")
def test_a_copy_is_for_all_of_its_weights() -> None:
    """The second of two may be written to, or die and leave its address to another."""
    linear, x = products("float32", SHAPES[0], "all").norm_linear, drawn("float32", 4, 33)
    norm, first, seen = torch.ones(33), drawn("float32", 8, 33), set()
    for _ in range(20):
        second = drawn("float32", 8, 33)
        seen.add(second.data_ptr())
        for change in (lambda: None, lambda s=second: s.mul_(2)):
            change()
            _, _, found = linear(x, None, norm, 0.0, first, None, second, None)
            normed = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
            close(found, normed @ second.double().T, "float32")
    assert len(seen) < 20, "an address came again, or this test shows nothing"


@pytest.mark.usefixtures("inference")
def test_a_weight_whose_changes_nobody_counts_is_not_packed() -> None:
    weight, x = torch.randn(97, 33), torch.randn(4, 33)
    assert weight.is_inference()
    made = products("float32", SHAPES[0], "all")
    for _ in range(2):
        close(made.linear(x, weight, None), x.double() @ weight.double().T, "float32")
        weight.mul_(2)
    assert not kept(made.copies)


def test_threads_do_not_share_fp32_memory() -> None:
    """Two models that generate at once."""
    linear = products("bfloat16", SHAPES[0], None, native=False).linear
    x, wrong = drawn("bfloat16", 16, 512), []

    def run() -> None:
        weight = drawn("bfloat16", 600, 512)
        wanted = x.double() @ weight.double().T
        with torch.inference_mode():
            for _ in range(20):
                found = linear(x, weight, None).double()
                wrong.extend([1] if (found - wanted).abs().max() > 2e-2 * wanted.abs().max() else [])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_with_gradients_it_is_the_reference() -> None:
    x, weight = torch.randn(4, 33, requires_grad=True), torch.randn(97, 33, requires_grad=True)
    products("float32", SHAPES[0], "all").linear(x, weight, None).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": True}, "generation"), ({"device": "cuda"}, "'cuda'"), ({"operation": "attention"}, "'attention'"),
        ({"dtype": "float16"}, "'float16'"), ({"tensor": 2}, "one process"),
    ],
)  # fmt: skip
def test_refuses_with_a_reason(change: dict[str, object], named: str) -> None:
    verdict = OneDnn().probe(evolve(REQUEST, **change))
    assert isinstance(verdict, Refuse)
    assert named in verdict.why


def test_refuses_a_torch_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(OneDnn().probe(REQUEST), Accept)
    onednn._lacks.cache_clear()
    monkeypatch.setattr(onednn, "PRIVATE", ("_gone",))
    verdict = OneDnn().probe(REQUEST)
    assert isinstance(verdict, Refuse)
    assert "_gone" in verdict.why
    onednn._lacks.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    verdict = OneDnn().probe(REQUEST)
    assert isinstance(verdict, Refuse)
    assert "no oneDNN" in verdict.why
    onednn._lacks.cache_clear()
