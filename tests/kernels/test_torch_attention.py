"""Attention over packed documents and over a cache, against a float64 definition written here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nanovllm_kernels import torch_causal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanovllm_core.contracts import Batch, Ops

MakeOps = Callable[[str], Ops]
Pack = Callable[..., Batch]
LENGTHS = [
    (1,), (5,), (6, 6, 6), (1, 1, 1), (3, 9, 1, 4), (40, 37, 2, 40, 100, 17, 1), (64, 64, 1, 64), (300, 128, 129, 300),
]  # fmt: skip
HEADS = [(1, 1, 4), (4, 2, 6), (6, 1, 10), (3, 3, 16)]  # query heads, key/value heads, head size


def attention_64(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """softmax(q k / sqrt(H)) v, for each document and head by itself, over what is not later nor beyond the window."""
    out, start = torch.empty_like(q), 0
    share = q.shape[1] // k.shape[1]
    for n in lengths:
        rows = slice(start, start + n)
        age = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (age < 0) | (age >= (window or n))
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // share].T * q.shape[2] ** -0.5
            scores = scores.masked_fill(hidden, -torch.inf)
            out[rows, head] = scores.softmax(-1) @ v[rows, head // share]
        start += n
    return out


def qkv(t: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    n, k, h = heads
    return [torch.randn(t, count, h, dtype=torch.float64).to(dtype).requires_grad_() for count in (n, k, k)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_documents(
    make_ops: MakeOps, pack: Pack, lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: str, tolerance: float
) -> None:
    given = qkv(sum(lengths), heads, getattr(torch, dtype))
    reference = [x.detach().double().requires_grad_() for x in given]
    out = make_ops(dtype).attention(*given, pack(*lengths))
    wanted = attention_64(*reference, lengths)
    assert out.dtype == given[0].dtype
    assert out.shape == wanted.shape
    assert (out.double() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1)
    weight = torch.randn_like(wanted)
    (out * weight.to(out.dtype)).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(given, reference, strict=True):
        assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max().clamp_min(1)


@pytest.mark.parametrize("lengths", [(5,), (6, 6, 6), (40, 37, 2, 40, 100, 17, 1), (300, 128, 129, 300)])
@pytest.mark.parametrize("window", [1, 2, 16, 37, 127, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_windows(
    make_ops: MakeOps, pack: Pack, lengths: tuple[int, ...], window: int, dtype: str, tolerance: float
) -> None:
    given = qkv(sum(lengths), (4, 2, 6), getattr(torch, dtype))
    reference = [x.detach().double().requires_grad_() for x in given]
    out = make_ops(dtype).attention(*given, pack(*lengths), window=window)
    wanted = attention_64(*reference, lengths, window)
    assert out.dtype == given[0].dtype
    assert (out.double() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1)
    weight = torch.randn_like(wanted)
    (out * weight.to(out.dtype)).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(given, reference, strict=True):
        assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max().clamp_min(1)


def test_a_window_no_shorter_than_the_documents_changes_no_bit(make_ops: MakeOps, pack: Pack) -> None:
    attention, batch, given = make_ops("float32").attention, pack(30, 9), qkv(39, (4, 2, 6), torch.float32)
    assert attention(*given, batch, window=30).equal(attention(*given, batch))
    assert not attention(*given, batch, window=29).equal(attention(*given, batch))


def test_what_the_window_hides_changes_no_bit(make_ops: MakeOps, pack: Pack) -> None:
    attention, batch = make_ops("float32").attention, pack(300)
    q, k, v = (x.detach() for x in qkv(300, (2, 1, 4), torch.float32))
    before = attention(q, k, v, batch, window=20)
    k[150], v[150] = 50.0, -50.0
    after = attention(q, k, v, batch, window=20)
    changed = (after != before).flatten(1).any(1)
    assert changed[150:170].all()
    assert not changed[:150].any()
    assert not changed[170:].any()


class Largest(TorchDispatchMode):
    """The values of the largest tensor that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_over_a_long_document_needs_no_square_of_it(make_ops: MakeOps, pack: Pack, dtype: str) -> None:
    length, heads, window = 6000, 2, 50
    given, batch = qkv(length, (heads, 1, 4), getattr(torch, dtype)), pack(length)
    with Largest() as largest:
        make_ops(dtype).attention(*given, batch, window=window).sum().backward()
    assert 0 < largest.values <= length * heads * window


@pytest.mark.parametrize("lengths", [(7, 7, 7), (23, 5, 61)])
def test_training_after_an_evaluation_with_the_same_lengths(
    make_ops: MakeOps, pack: Pack, lengths: tuple[int, ...]
) -> None:
    attention, given = make_ops("float32").attention, qkv(sum(lengths), (2, 1, 4), torch.float32)
    with torch.inference_mode():
        wanted = attention(*given, pack(*lengths))
    out = attention(*given, pack(*lengths))
    out.sum().backward()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("lengths", [(5,), (3, 3), (2, 4, 1)])
def test_gradcheck(make_ops: MakeOps, pack: Pack, lengths: tuple[int, ...]) -> None:
    batch = pack(*lengths)
    attention = make_ops("float32").attention
    for window in (None, 2):
        attend = partial(attention, batch=batch, window=window)
        assert torch.autograd.gradcheck(lambda q, k, v, f=attend: f(q, k, v), qkv(sum(lengths), (4, 2, 3)))


@pytest.mark.parametrize(("documents", "length"), [(1, 1), (2, 3), (3, 7), (2, 8)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 7])
@pytest.mark.parametrize("scores", [1, 2**22])
def test_blocks_of_queries(
    monkeypatch: pytest.MonkeyPatch,
    documents: int,
    length: int,
    heads: tuple[int, int, int],
    window: int | None,
    scores: int,
) -> None:
    """In float64, in blocks of 3 queries, one document at a time and all at once."""
    monkeypatch.setitem(torch_causal.QUERIES, "cpu", 3)
    monkeypatch.setitem(torch_causal.SCORES, "cpu", scores)
    given = [x.detach().view(documents, length, *x.shape[1:]).requires_grad_() for x in qkv(documents * length, heads)]
    out = torch_causal.BlockwiseCausal.apply(*given, window)
    wanted = attention_64(*(x.detach().flatten(0, 1) for x in given), (length,) * documents, window)
    assert out.flatten(0, 1).allclose(wanted, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda q, k, v: torch_causal.BlockwiseCausal.apply(q, k, v, window), given, fast_mode=True
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(7, 7, 7, 7), (40, 37, 2, 41), (300, 290, 5, 64)])
@pytest.mark.parametrize("window", [None, 5])
def test_borders_are_exact(
    make_ops: MakeOps, pack: Pack, dtype: str, lengths: tuple[int, ...], window: int | None
) -> None:
    """Changing one document, even to NaN, changes no bit of another's output or gradient."""
    attention, batch = make_ops(dtype).attention, pack(*lengths)
    clean = [x.detach() for x in qkv(sum(lengths), (4, 2, 8), getattr(torch, dtype))]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for changed in range(len(lengths)):
        mine = torch.zeros(sum(lengths), dtype=torch.bool)
        mine[ends[changed] - lengths[changed] : ends[changed]] = True
        results = []
        for poison in (1.0, torch.nan):
            inputs = [x.clone().requires_grad_() for x in clean]
            with torch.no_grad():
                for x in inputs:
                    x[mine] *= poison
            out = attention(*inputs, batch, window=window)
            out[~mine].sum().backward()
            results.append([out.detach()[~mine], *(x.grad[~mine] for x in inputs)])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_later_tokens_do_not_reach_back(make_ops: MakeOps, pack: Pack) -> None:
    attention, batch = make_ops("float32").attention, pack(9, 4)
    q, k, v = (x.detach() for x in qkv(13, (2, 2, 4), torch.float32))
    before = attention(q, k, v, batch)
    k[8], v[8] = 50.0, -50.0
    assert attention(q, k, v, batch)[:8].equal(before[:8])
