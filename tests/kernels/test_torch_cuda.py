"""The same operations on a GPU, against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve
from nanovllm_kernels.torch import Torch
from torch import Tensor

from nanovllm_core.contracts import GENERATION, IGNORE, KV, OPERATIONS, Batch, KernelRequest, Ops, Shape
from nanovllm_core.testing.kernel_caches import CASES, Case, paged_call
from nanovllm_core.testing.reference import DEFINITIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

REQUEST = KernelRequest(
    operation="linear", device="cuda", dtype="float32",
    shape=Shape(family="llama", vocab_size=8, layers=1, hidden=4, heads=1, kv_heads=1, head_dim=4, intermediate=8,
                tied=True, max_positions=8, parameters=0, operations=OPERATIONS),
)  # fmt: skip
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def ops_for(dtype: str) -> Ops:
    requests = {name: evolve(REQUEST, operation=name, dtype=dtype) for name in (*OPERATIONS, *GENERATION)}
    return Ops(dtype=dtype, **{name: Torch().load(request) for name, request in requests.items()})


def agree(op: Callable[..., Tensor], dtype: str, *inputs: Tensor) -> None:
    """Value and gradients of op on the GPU in dtype, and on the CPU in float64, from the same rounded inputs."""
    rounded = [x.to(getattr(torch, dtype)) for x in inputs]
    given = [x.cuda().requires_grad_() for x in rounded]
    wanted = [x.double().requires_grad_() for x in rounded]
    out, reference = op(*given), op(*wanted)
    factor = torch.randn_like(reference)
    (out * factor.to(out)).sum().backward()
    (reference * factor.to(out.dtype)).sum().backward()
    for a, b in ((out, reference), *((x.grad, y.grad) for x, y in zip(given, wanted, strict=True))):
        assert a.device.type == "cuda"
        assert (a.detach().cpu().double() - b.detach()).abs().max() <= TOLERANCE[
            dtype
        ] * b.detach().abs().max().clamp_min(1)


def batch_on(lengths: tuple[int, ...], device: str) -> Batch:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(positions=positions.to(device), lengths=lengths, cu_seqlens=ends.to(device, torch.int32))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_small_operations(dtype: str) -> None:
    ops = ops_for(dtype)
    agree(lambda x, w: ops.linear(x, w), dtype, torch.randn(33, 40), torch.randn(24, 40))
    agree(lambda x, w: ops.rms_norm(x, w, 1e-6), dtype, torch.randn(33, 3, 16), torch.randn(16))
    agree(lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), dtype,
          torch.randn(33, 3, 16), torch.randn(16), torch.randn(16))  # fmt: skip
    for tanh in (False, True):
        agree(lambda x, t=tanh: ops.gelu(x, t), dtype, torch.randn(33, 48))
    agree(ops.swiglu, dtype, torch.randn(33, 48), torch.randn(33, 48))
    cos, sin = torch.randn(33, 16), torch.randn(33, 16)
    agree(lambda q, k: torch.cat(ops.rotary(q, k, cos.to(q.device), sin.to(q.device)), 1), dtype,
          torch.randn(33, 4, 16), torch.randn(33, 2, 16))  # fmt: skip
    table = torch.randn(9, 8)
    ids = torch.randint(0, 9, (20,))
    assert ops.embedding(ids.cuda(), table.cuda()).cpu().equal(table[ids].to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(64,), (16, 16), (1, 30, 7, 100, 29), (5, 130, 128), (1100, 3)])
@pytest.mark.parametrize("window", [None, 16, 128])
def test_documents(dtype: str, lengths: tuple[int, ...], window: int | None) -> None:
    ops, t = ops_for(dtype), sum(lengths)
    agree(lambda q, k, v: ops.attention(q, k, v, batch_on(lengths, q.device.type), None, window), dtype,
          torch.randn(t, 4, 64), torch.randn(t, 2, 64), torch.randn(t, 2, 64))  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_loss(dtype: str, ignored: float) -> None:
    ops, targets = ops_for(dtype), torch.randint(0, 1000, (700,))
    targets[torch.rand(700) < ignored] = IGNORE
    agree(lambda x, w: ops.linear_cross_entropy(x, w, targets.to(x.device)), dtype,
          torch.randn(700, 32), torch.randn(1000, 32))  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages(dtype: str, window: int | None, case: Case) -> None:
    call, kv = paged_call(
        evolve(REQUEST, operation="paged_attention", dtype=dtype, device="cuda", training=False), case
    )
    found = ops_for(dtype).paged_attention(*call.args, KV(kv.k_PSKH.clone(), kv.v_PSKH.clone()), window)
    wide = [x.double() if isinstance(x, Tensor) else x for x in call.args]
    wanted = DEFINITIONS["paged_attention"](*wide, kv, window)
    assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * 3
