"""Tests of the Triton kernels on small calls, for a process of their own: `test_triton.py` starts it.

Where there is no GPU they run in Triton's interpreter, which is settled when triton is first imported (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from nanovllm_kernels import triton_row
from nanovllm_kernels.triton import SOURCES, Triton
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovllm_core.assemble import lay
from nanovllm_core.contracts import GENERATION, KV, Accept, KernelRequest, Refuse
from nanovllm_core.testing.kernel_caches import CASES, Case, paged_call, recorded
from nanovllm_core.testing.kernel_calls import Answer, Call, answer, bits, calls, defined, poisoned, share, strided
from nanovllm_core.testing.kernel_cases import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINED = [o for o in SOURCES if o not in GENERATION]
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}  # shares of the largest value; the interpreter's casts to bf16 truncate


def request_for(operation: str, dtype: str = "float32") -> KernelRequest:
    return KernelRequest(operation=operation, device=DEVICE, dtype=dtype, shape=SHAPES[0])


def same(found: Answer, right: Answer, dtype: str = "float32", told: object = "") -> None:
    """Outputs and gradients, each of them there."""
    pairs = zip([*found.outputs, *found.gradients], [*right.outputs, *right.gradients], strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a is not None
        assert b is not None
        assert share(a, b) <= TOLERANCE[dtype], (told, i)


def as_defined(operation: str, call: Call) -> None:
    same(
        answer(Triton().load(request_for(operation)), call, call.leaves),
        defined(operation, call, call.leaves),
        told=operation,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", TRAINED)
def test_outputs_and_gradients_are_those_of_the_definition(operation: str, dtype: str) -> None:
    """New memory holds NaN until it is written; one token, none, and more than a program's rows."""
    request, function = request_for(operation, dtype), Triton().load(request_for(operation, dtype))
    for lengths in ((5, 1, 9), (1,), ()):
        for call in calls(request, lengths):
            with poisoned():
                found = answer(function, call, call.leaves)
            same(found, defined(operation, call, call.leaves), dtype, (call.label, lengths))


@pytest.mark.parametrize("operation", [o for o in TRAINED if o not in ("linear", "linear_cross_entropy")])
def test_inputs_may_be_parts_of_wider_rows(operation: str) -> None:
    call = calls(request_for(operation), (5, 2))[0]
    for i in call.activations:
        call.args[i] = strided(call.args[i]).tensor
    as_defined(operation, call)


def test_weights_angles_and_targets_may_be_strided() -> None:
    strides = {"norm_rotary": (2, 3, 5), "rms_norm": (1,), "layer_norm": (1, 2), "linear_cross_entropy": (2,)}
    for operation, placed in strides.items():
        call = calls(request_for(operation), (5, 2))[0]
        for i in placed:
            call.args[i] = torch.stack([call.args[i], call.args[i]], -1)[..., 0]
        as_defined(operation, call)


def test_a_target_that_there_is_not_makes_no_number() -> None:
    call = calls(request_for("linear_cross_entropy"), (5,))[0]
    call.args[2][1] = SHAPES[0].vocab_size
    assert answer(Triton().load(request_for("linear_cross_entropy")), call, ()).outputs[0].isnan()


@pytest.mark.parametrize("operation", TRAINED)
def test_no_gradient_of_a_gradient_is_made_up(operation: str) -> None:
    """They are not implemented, and say so."""
    call = calls(request_for(operation), (5,))[0]
    args = [a.requires_grad_() if i in call.leaves else a for i, a in enumerate(call.args)]
    outputs = Triton().load(request_for(operation))(*args)
    output = sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
    (first,) = torch.autograd.grad(output, args[call.leaves[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_linear_takes_more_axes() -> None:
    x, weight = (
        torch.randn(2, 3, 4, device=DEVICE, requires_grad=True),
        torch.randn(5, 4, device=DEVICE, requires_grad=True),
    )
    function = Triton().load(request_for("linear"))
    found = torch.autograd.grad(function(x, weight).square().sum(), (x, weight))
    right = torch.autograd.grad((x @ weight.T).square().sum(), (x, weight))
    for a, b in zip(found, right, strict=True):
        assert share(a, b) <= TOLERANCE["float32"]


def test_a_turned_weights_gradient_stands_as_the_weight() -> None:
    x, weight = torch.randn(7, 4, device=DEVICE), torch.randn(4, 5, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(Triton().load(request_for("linear"))(x, weight.t()).square().sum(), weight)
    (right,) = torch.autograd.grad((x @ weight).square().sum(), weight)
    assert found.is_contiguous()
    assert share(found, right) <= TOLERANCE["float32"]


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm", "norm_rotary", "norm_linear"])
def test_a_program_walks_over_many_tiles(operation: str) -> None:
    """More tiles than programs: what each adds up over its tiles, and all of them together, is the whole sum."""
    as_defined(operation, calls(request_for(operation), (150,))[0])


def test_the_loss_is_made_in_chunks_of_vocabulary_and_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm_kernels import triton_loss

    monkeypatch.setattr(triton_loss, "BLOCK", 32)  # of 97
    monkeypatch.setattr(triton_loss, "ALIGNED", 8)  # 104
    monkeypatch.setattr(triton_loss, "chunk_rows", lambda tokens, vocabulary: 4)  # of 11
    call = calls(request_for("linear_cross_entropy"), (11,))[0]
    call.args[2][3:6] = -100
    as_defined("linear_cross_entropy", call)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "rows"), [(32_768, 151_936, 8_192), (1_000, 97, 1_024), (32_769, 97, 8_256), (5, 2**31, 1)]
)
def test_a_chunk_is_a_quarter_of_the_tokens_within_bounds(tokens: int, vocabulary: int, rows: int) -> None:
    from nanovllm_kernels.triton_loss import chunk_rows

    assert chunk_rows(tokens, vocabulary) == rows


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (70, 33), (1025, 3)])
def test_sums_over_rows(rows: int, columns: int) -> None:
    from nanovllm_kernels.triton_sums import column_sums

    wide = torch.randn(rows, columns + 2, device=DEVICE)
    with poisoned():
        found = column_sums(wide[:, 1:-1])
    assert share(found, wide.double()[:, 1:-1].sum(0)) <= TOLERANCE["float32"]


def test_a_block_that_is_computed_again_makes_no_product_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`swiglu_linear` at its end: the second run is over before it, and gradients are those without it, bit for bit."""
    from nanovllm_kernels import triton_swiglu

    call, products = calls(request_for("swiglu_linear"), (5, 1, 9))[0], []
    inner = triton_swiglu.product
    monkeypatch.setattr(triton_swiglu, "product", lambda gate, up: products.append(1) or inner(gate, up))

    def block(gate: Tensor, up: Tensor, *rest: Tensor) -> Tensor:
        return triton_swiglu.swiglu_linear(gate * 2, up * 2, *rest)

    plain = answer(block, call, call.leaves)
    again = answer(lambda *args: checkpoint(block, *args, use_reentrant=False), call, call.leaves)
    assert len(products) == 2  # one a forward
    for a, b in zip(plain.gradients, again.gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_refuses_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Triton().probe
    asked = {"operation": "rms_norm", "device": "cuda", "dtype": "bfloat16", "shape": SHAPES[0]}
    accepted = probe(KernelRequest(**asked))
    assert isinstance(accepted, Accept)
    assert accepted.priority == 20
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for change, reason in (
        ({"operation": "attention"}, "does not implement 'attention'"),
        ({"dtype": "float16"}, "dtype 'float16' is not one of"),
        ({"device": "cpu"}, "Triton compiles for a GPU"),
    ):
        refused = probe(KernelRequest(**asked | change))
        assert isinstance(refused, Refuse)
        assert reason in refused.why


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", TRAINED)
def test_generation_has_ways_of_its_own(operation: str, dtype: str) -> None:
    """No gradients, weights in the compute dtype: one row, some, none; parts of wider rows; in new memory that holds NaN."""
    request = evolve(request_for(operation, dtype), training=False)
    function = Triton().load(request)
    for lengths in ((5, 1, 9), (1,), ()):
        for call in calls(request, lengths):
            wanted = defined(operation, call, ())
            with poisoned():
                same(answer(function, call, ()), wanted, dtype, (call.label, lengths))
            for i in call.activations if operation != "linear_cross_entropy" else ():
                call.args[i] = strided(call.args[i]).tensor
            same(answer(function, call, ()), wanted, dtype, (call.label, lengths, "strided"))


@pytest.mark.parametrize("size", [1025, 2500])
def test_one_row_may_be_longer_than_a_program_holds(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    wide, weight, bias, norm = (
        torch.randn(n, generator=generator).to(DEVICE) for n in ((3, 2 * size), (6, size), (6,), (size,))
    )
    x, more = wide[1:2, :size], wide[2:3, size:]
    summed, normed = x + more, torch.nn.functional.rms_norm(x + more, (size,), norm, 1e-6)
    with torch.no_grad(), poisoned():
        found = triton_row.norm_linear_of_one(x, more, norm, 1e-6, weight)
        gated = triton_row.swiglu_linear_of_one(x, more, weight, bias)
        plain = triton_row.linear_of_one(x, weight, bias)
    assert torch.equal(found[0], summed)
    assert share(found[1], normed @ weight.T) <= TOLERANCE["float32"]
    assert share(gated, (torch.nn.functional.silu(x) * more) @ weight.T + bias) <= TOLERANCE["float32"]
    assert share(plain, x @ weight.T + bias) <= TOLERANCE["float32"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lengths", [(5, 2), (1,)])
def test_weights_side_by_side_are_one_product(bias: bool, lengths: tuple[int, ...]) -> None:
    """To generate; where there is a bias, or a gradient, or other memory, each is a product of its own."""
    request = evolve(request_for("norm_linear"), training=False)
    call = calls(request, lengths)[0]
    weights = [nn.Parameter(w.float()) for w in call.args[4::2]]
    wanted = defined("norm_linear", call, ()).outputs
    if not bias:
        call.args[5::2] = [None] * 3
        wanted = defined("norm_linear", call, ()).outputs
    lay(weights)
    call.args[4::2] = [w.data for w in weights]
    found = answer(Triton().load(request), call, ()).outputs
    same(Answer(found, []), Answer(wanted, []))
    shared = {x.untyped_storage().data_ptr() for x in found[1:]}
    assert len(shared) == (3 if bias else 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "shape", "window"), [("float32", 0, None), ("bfloat16", 1, 5), ("float32", 3, 64), ("float32", 2, 1)]
)
def test_pages(dtype: str, shape: int, window: int | None, case: Case) -> None:
    """Beside the definition, in new memory that holds NaN; a past that is split among programs is among the cases."""
    request = KernelRequest(
        operation="paged_attention", device=DEVICE, dtype=dtype, shape=SHAPES[shape], training=False
    )
    call, kv = paged_call(request, case)
    more, theirs, right, again = {"window": window}, *(KV(kv.k_PSKH.clone(), kv.v_PSKH.clone()) for _ in range(3))
    wanted = defined("paged_attention", evolve(call, args=[*call.args, right], kwargs=more), ())
    with poisoned():
        found = answer(Triton().load(request), evolve(call, args=[*call.args, theirs], kwargs=more), ())
    same(found, wanted, dtype, case)
    if set(case.new) == {1}:
        held = recorded(call)
        with poisoned():
            found = answer(Triton().load(request), evolve(held, args=[*held.args, again], kwargs=more), ())
        same(found, wanted, dtype, (case, "recorded"))
        assert torch.equal(bits(again.k_PSKH), bits(right.k_PSKH))
        assert torch.equal(bits(again.v_PSKH), bits(right.v_PSKH))
    assert torch.equal(bits(theirs.k_PSKH), bits(right.k_PSKH))
    assert torch.equal(bits(theirs.v_PSKH), bits(right.v_PSKH))
