"""Kernels that are wrong in one way each, told by the test that is there for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attrs import evolve, field, frozen

from nanovllm_core import hookimpl
from nanovllm_core.contracts import GENERATION, IGNORE, KV, OPERATIONS, Accept, Refuse
from nanovllm_core.testing import KernelContract, failures
from nanovllm_core.testing.kernel_cases import SHAPES
from nanovllm_core.testing.reference import reference_ops


@frozen(kw_only=True, eq=False)
class Defined:
    """The definitions, rounded; or one function in place of one of them."""

    operation: str = field(default="swiglu", metadata={"internal": True})
    function: object = field(default=None, metadata={"internal": True})

    @hookimpl
    def probe(self, request):
        if (
            request.operation in (*OPERATIONS, *GENERATION)
            and request.device in ("cpu", "cuda")
            and request.dtype != "float7"
        ):
            return Accept(why="by definition")
        return Refuse("unknown")

    @hookimpl
    def load(self, request):
        right = getattr(reference_ops(request.dtype), request.operation)
        if self.function is None or request.operation != self.operation:
            return right
        return partial(self.function() if isinstance(self.function, type) else self.function, right)


def told(operation, function, component=Defined):
    class Kit(KernelContract):
        operations = (operation,)
        shapes = SHAPES[:2]

    Kit.component = component(operation=operation, function=function)
    return set(failures(Kit))


def test_the_definitions_are_right():
    class Kit(KernelContract):
        component = Defined()
        shapes = SHAPES[:2]

    assert failures(Kit) == {}


# ---------------------------------------------------------------- probes


class AcceptsAll(Defined):
    """Accepts all."""

    @hookimpl
    def probe(self, request):
        return Accept(why="of course")


class RaisesAtTheUnknown(Defined):
    """Raises."""

    @hookimpl
    def probe(self, request):
        getattr(torch, request.dtype)
        return super().probe(request) if request.device != "abacus" else Refuse("no abacus")


class RefusesItsOwn(Defined):
    """Refuses."""

    @hookimpl
    def probe(self, request):
        return Refuse("busy")


def test_probes():
    assert told("swiglu", None, AcceptsAll) == {"test_refuses_what_it_cannot"}
    assert "test_refuses_what_it_cannot" in told("swiglu", None, RaisesAtTheUnknown)
    assert told("swiglu", None, RefusesItsOwn) == {"test_accepts_its_operations"}


# ---------------------------------------------------------------- values


def half_gradient(right, gate, up):
    return right(gate, (up + up.detach()) / 2)


def no_gradient(right, gate, up):
    return right(gate, up.detach())


def other_dtype(right, gate, up):
    return right(gate, up).double()


def mean_loss(right, x, weight, targets):
    return right(x, weight, targets) / max(1, int((targets != IGNORE).sum()))


def mean_square_in_bf16(right, x, weight, eps):
    return right(x.bfloat16().to(x.dtype), weight, eps)


def loses_the_last_id(right, ids, weight):
    return right(ids.clamp(max=len(weight) - 2), weight)


def adds_up_in_bf16(right, ids, weight):
    return BfloatRows.apply(ids, weight, right)


class BfloatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, right):
        ctx.save_for_backward(ids, weight)
        return right(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        ids, weight = ctx.saved_tensors
        total = torch.zeros(weight.shape, dtype=torch.bfloat16)
        for i, g in zip(ids.tolist(), grad.bfloat16(), strict=True):
            total[i] += g
        return None, total.float(), None


def overflows(right, gate, up):
    return (gate * torch.exp(gate) / (1 + torch.exp(gate)) * up).to(gate.dtype)


def exponentials_unshifted(right, x, weight, targets):
    kept = targets != IGNORE
    logits = (x[kept] @ weight.to(x.dtype).T).float()
    return (logits.exp().sum(-1).log() - logits.gather(1, targets[kept][:, None])[:, 0]).sum()


# ---------------------------------------------------------------- memory


def reads_past_the_end(right, x, weight, eps):
    """The next value in memory, where there is one, is looked at and multiplied by nothing."""
    end = x.storage_offset() + x.numel()
    if x.is_contiguous() and x.untyped_storage().nbytes() // x.element_size() > end:
        return right(x, weight, eps) + 0 * x.detach().as_strided((1,), (1,), end)
    return right(x, weight, eps)


def writes_past_the_end(right, x, weight, eps):
    end = x.storage_offset() + x.numel()
    if x.is_contiguous() and x.untyped_storage().nbytes() // x.element_size() > end:
        x.detach().as_strided((1,), (1,), end).fill_(0)
    return right(x, weight, eps)


def takes_rows_for_contiguous(right, gate, up):
    return right(gate, up.as_strided(up.shape, torch.empty(up.shape, device="meta").stride(), up.storage_offset()))


def works_in_place(right, gate, up):
    out = right(gate, up)
    with torch.no_grad():
        gate.mul_(2)
    return out


def adds_to_new_memory(right, gate, up):
    return torch.empty_like(gate) * 0 + right(gate, up)


def fails_on_nothing(right, x, tanh):
    return right(x, tanh) if x.detach().abs().max() >= 0 else x


class Stale:
    """Works in a buffer that keeps what a longer call left."""

    def __init__(self):
        self.longest = 0

    def __call__(self, right, x, tanh):
        self.longest = max(self.longest, len(x))
        return right(x, tanh) + (self.longest > len(x))


# ---------------------------------------------------------------- loss


def counts_ignored(right, x, weight, targets):
    return right(x, weight, targets.clamp_min(0))


def nan_without_targets(right, x, weight, targets):
    loss, count = right(x, weight, targets), (targets != IGNORE).sum()
    return loss / count * count


# ---------------------------------------------------------------- attention


def whole_batch(right, q, k, v, batch, window=None):
    lengths = (sum(batch.lengths),) if batch.lengths else ()
    return right(q, k, v, evolve(batch, lengths=lengths), window)


def no_window(right, q, k, v, batch, window=None):
    return right(q, k, v, batch, None)


def window_off_by_one(right, q, k, v, batch, window=None):
    return right(q, k, v, batch, window and window + 1)


def sees_ahead(right, q, k, v, batch, window=None):
    if window or not batch.lengths:
        return right(q, k, v, batch, window)
    parts = zip(*(x.float().split(list(batch.lengths)) for x in (q, k, v)), strict=True)
    out = []
    for a, b, c in parts:
        b, c = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (b, c))
        scores = torch.einsum("lnh,snh->nls", a, b) * q.shape[-1] ** -0.5
        out.append(torch.einsum("nls,snh->lnh", scores.softmax(-1), c))
    return torch.cat(out).to(q.dtype)


def paged_no_window(right, q, k, v, batch, kv, window=None):
    return right(q, k, v, batch, kv, None)


def paged_window_off_by_one(right, q, k, v, batch, kv, window=None):
    return right(q, k, v, batch, kv, window and window + 1)


def writes_to_no_page(right, q, k, v, batch, kv, window=None):
    return right(q, k, v, batch, KV(kv.k_PSKH.clone(), kv.v_PSKH.clone()), window)


def pages_in_a_row(right, q, k, v, batch, kv, window=None):
    """Takes the pages that follow a sequence's first one."""
    first_D1, count = batch.paging.tables_DP[:, :1], batch.paging.tables_DP.shape[1]
    tables = (first_D1 + torch.arange(count)).clamp_max(len(kv.k_PSKH) - 2).int()
    return right(q, k, v, evolve(batch, paging=evolve(batch.paging, tables_DP=tables)), kv, window)


def sees_beyond_the_sequence(right, q, k, v, batch, kv, window=None):
    places = batch.paging.tables_DP.shape[1] * kv.k_PSKH.shape[1]
    further = tuple(min(c + 1, places) for c in batch.paging.contexts)
    if batch.paging.contexts == batch.lengths:
        return right(q, k, v, batch, kv, window)
    paging = evolve(batch.paging, contexts=further, contexts_D=torch.tensor(further, dtype=torch.int32))
    return right(q, k, v, evolve(batch, paging=paging), kv, window)


WRONG = [
    ("swiglu", half_gradient, {"test_gradients_are_those_of_the_definition"}),
    ("swiglu", no_gradient, {"test_gradients_are_those_of_the_definition"}),
    ("swiglu", other_dtype, {"test_outputs_are_those_of_the_definition"}),
    ("linear_cross_entropy", mean_loss, {"test_outputs_are_those_of_the_definition"}),
    ("rms_norm", mean_square_in_bf16, {"test_outputs_are_those_of_the_definition"}),
    ("embedding", loses_the_last_id, {"test_outputs_are_those_of_the_definition"}),
    ("embedding", adds_up_in_bf16, {"test_weight_gradients_add_up_over_many_tokens"}),
    ("swiglu", overflows, {"test_large_values"}),
    ("linear_cross_entropy", exponentials_unshifted, {"test_confident_logits"}),
    ("rms_norm", reads_past_the_end, {"test_reads_nothing_beyond_its_inputs"}),
    ("rms_norm", writes_past_the_end, {"test_reads_nothing_beyond_its_inputs"}),
    ("swiglu", takes_rows_for_contiguous, {"test_takes_strided_inputs"}),
    ("swiglu", works_in_place, {"test_leaves_its_inputs_as_they_are"}),
    ("swiglu", adds_to_new_memory, {"test_writes_all_of_its_results"}),
    ("gelu", fails_on_nothing, {"test_one_token_and_none"}),
    ("gelu", Stale, {"test_is_the_same_again"}),
    ("linear_cross_entropy", counts_ignored, {"test_ignored_targets_are_left_out", "test_no_target_is_trained"}),
    ("linear_cross_entropy", nan_without_targets, {"test_no_target_is_trained"}),
    ("attention", whole_batch, {"test_documents_do_not_see_each_other"}),
    ("attention", no_window, {"test_looks_back_a_window"}),
    ("attention", window_off_by_one, {"test_looks_back_a_window"}),
    ("attention", sees_ahead, {"test_later_tokens_change_nothing_before_them"}),
    ("paged_attention", paged_no_window, {"test_decodes_within_a_window"}),
    ("paged_attention", paged_window_off_by_one, {"test_decodes_within_a_window"}),
    ("paged_attention", writes_to_no_page, {"test_decodes_over_pages", "test_decodes_within_a_window"}),
    ("paged_attention", pages_in_a_row, {"test_decodes_over_pages", "test_decodes_within_a_window"}),
    ("paged_attention", sees_beyond_the_sequence, {"test_decodes_over_pages", "test_decodes_within_a_window"}),
]
EXACTLY = {
    other_dtype, writes_past_the_end, takes_rows_for_contiguous, fails_on_nothing, no_window, window_off_by_one,
    paged_no_window, paged_window_off_by_one, writes_to_no_page, pages_in_a_row, sees_beyond_the_sequence,
}  # fmt: skip


@pytest.mark.parametrize(("operation", "function", "tests"), WRONG, ids=lambda v: getattr(v, "__name__", None))
def test_kernels(operation, function, tests):
    found = told(operation, function)
    assert tests <= found
    if function in EXACTLY:
        assert found == tests
