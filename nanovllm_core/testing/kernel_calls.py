"""Calls of an operation: seeded inputs of odd sizes, placed in memory so that a step too far is seen, and the answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve, field
from torch import Tensor

from nanovllm_core.contracts import Batch, KernelRequest
from nanovllm_core.testing.modelling import pack
from nanovllm_core.testing.reference import DEFINITIONS

MARGIN = 64  # values on either side of a guarded tensor: keeps what alignment it had


@define
class Call:
    """One call: its arguments in order, which of them are differentiated, which are activations."""

    label: str
    args: list[Any]
    leaves: tuple[int, ...]
    activations: tuple[int, ...]
    kwargs: dict[str, Any] = field(factory=dict)

    def to(self, device: str) -> Call:
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in self.args]
        for i, a in enumerate(moved):
            if isinstance(a, Batch):
                there = {n: getattr(a, n).to(device) for n in ("positions", "cu_seqlens")}
                moved[i] = evolve(a, **there)
        return evolve(self, args=moved)


def calls(
    request: KernelRequest, lengths: Sequence[int], seed: int = 0, scale: float = 1.0, masters: bool = True
) -> list[Call]:
    """Calls of the request's operation on documents of these lengths; activations are normal times `scale`. For training
    weights are fp32 `masters`, or of the compute dtype."""
    s, tokens = request.shape, sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, request.dtype)
    master = torch.float32 if request.training and masters else dtype

    def draw(*size: int, of: torch.dtype = dtype, by: float = scale) -> Tensor:
        return (torch.randn(size, generator=generator) * by).to(of)

    def weight(*size: int, by: float = 1.0) -> Tensor:
        return draw(*size, of=master, by=by)

    def ids(high: int) -> Tensor:
        found = torch.randint(0, high, (tokens,), generator=generator)
        found[:1], found[-1:] = high - 1, 0  # the vocabulary's ends
        return found

    x_TC, inner = draw(tokens, s.hidden), s.intermediate
    if request.operation == "embedding":
        made = [Call("", [ids(s.vocab_size), weight(s.vocab_size, s.hidden)], (1,), ())]
    elif request.operation == "linear":
        w_OI, by = weight(inner, s.hidden, by=s.hidden**-0.5), s.hidden**-0.5
        made = [
            Call("with bias", [x_TC, w_OI, weight(inner)], (0, 1, 2), (0,)),
            Call("without bias", [draw(tokens, s.hidden), weight(inner, s.hidden, by=by), None], (0, 1), (0,)),
        ]
    elif request.operation == "rms_norm":
        heads = draw(tokens, s.heads, s.head_dim)
        made = [
            Call("of tokens", [x_TC, weight(s.hidden), 1e-6], (0, 1), (0,)),
            Call("of heads", [heads, weight(s.head_dim), 1e-5], (0, 1), (0,)),
        ]
    elif request.operation == "layer_norm":
        made = [Call("", [x_TC + scale, weight(s.hidden), weight(s.hidden), 1e-5], (0, 1, 2), (0,))]
    elif request.operation == "rotary":
        angles_TH = torch.rand(tokens, s.head_dim // 2, generator=generator).repeat(1, 2) * 100
        q, k = draw(tokens, s.heads, s.head_dim), draw(tokens, s.kv_heads, s.head_dim)
        made = [Call("", [q, k, angles_TH.cos(), angles_TH.sin()], (0, 1), (0, 1))]
    elif request.operation == "swiglu":
        made = [Call("", [draw(tokens, inner), draw(tokens, inner)], (0, 1), (0, 1))]
    elif request.operation == "norm_linear":
        widths, by = (inner, s.hidden, inner), s.hidden**-0.5
        ws = [weight(n, s.hidden, by=by) for n in widths]
        biases = [weight(n) for n in widths]
        mixed = [m for pair in zip(ws, (None, biases[1], None), strict=True) for m in pair]
        x, more, norm = draw(tokens, s.hidden), draw(tokens, s.hidden), weight(s.hidden)
        made = [
            Call("after an addition", [x, more, norm, 1e-6, *mixed], (0, 1, 2, 4, 6, 7, 8), (0, 1)),
            Call("without one", [x, None, norm, 1e-5, ws[0], biases[0]], (0, 2, 4, 5), (0,)),
        ]
    elif request.operation == "norm_rotary":
        angles_TH = torch.rand(tokens, s.head_dim // 2, generator=generator).repeat(1, 2) * 100
        q, k = draw(tokens, s.heads, s.head_dim), draw(tokens, s.kv_heads, s.head_dim)
        args = [q, k, weight(s.head_dim), weight(s.head_dim), 1e-6, angles_TH.cos(), angles_TH.sin()]
        made = [Call("", args, (0, 1, 2, 3), (0, 1))]
    elif request.operation == "swiglu_linear":
        gate, up, w_CI = draw(tokens, inner), draw(tokens, inner), weight(s.hidden, inner, by=inner**-0.5)
        made = [
            Call("with bias", [gate, up, w_CI, weight(s.hidden)], (0, 1, 2, 3), (0, 1)),
            Call("without bias", [gate, up, w_CI, None], (0, 1, 2), (0, 1)),
        ]
    elif request.operation == "gelu":
        made = [Call(f"tanh {t}", [draw(tokens, inner), t], (0,), (0,)) for t in (False, True)]
    elif request.operation == "attention":
        q, k, v = (draw(tokens, n, s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads))
        window = {} if s.window is None else {"window": s.window}
        made = [Call(f"documents {tuple(lengths)}", [q, k, v, pack(*lengths)], (0, 1, 2), (0, 1, 2), window)]
    else:
        w_VC = weight(s.vocab_size, s.hidden, by=s.hidden**-0.5)
        made = [Call("", [x_TC, w_VC, ids(s.vocab_size)], (0, 1), (0,))]
    return [call.to(request.device) for call in made]


@define
class Answer:
    """What came out, and the gradients of the leaves (None where none was asked)."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]


def answer(
    function: Callable[..., Any], call: Call, wanted: Sequence[int], cotangents: Sequence[Tensor] | None = None
) -> Answer:
    """Call it, and differentiate by the arguments `wanted`."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in call.args]  # a view of the same memory
    for i in wanted:
        args[i].requires_grad_()
    if not wanted:
        with torch.inference_mode():
            return Answer(_listed(function(*args, **call.kwargs)), [])
    outputs = _listed(function(*args, **call.kwargs))
    if cotangents is None:
        cotangents = likewise(outputs)
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [args[i] for i in wanted], [c for _, c in pairs], allow_unused=True
    )
    return Answer([o.detach() for o in outputs], list(found))


def likewise(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to come in: seeded values, the same for outputs of the same sizes; never all one."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(o.shape, generator=generator) if o.ndim else torch.tensor(0.37) for o in outputs]
    return [c.to(torch.bfloat16).to(o.device) for c, o in zip(made, outputs, strict=True)]  # exact in every dtype


def defined(operation: str, call: Call, wanted: Sequence[int], cotangents: Sequence[Tensor] | None = None) -> Answer:
    """The answer by the operation's definition, in float64."""
    args = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.args]
    return answer(DEFINITIONS[operation], evolve(call, args=args), wanted, cotangents)


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


# ---------------------------------------------------------------- memory


@define
class Placed:
    """A tensor, and all of the memory around it."""

    tensor: Tensor
    memory: Tensor
    before: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.before = self.memory.clone()

    def touched(self) -> bool:
        """Whether a bit of it changed."""
        return not torch.equal(bits(self.memory), bits(self.before))


def guarded(x: Tensor) -> Placed:
    """Contiguous, between margins of NaN (for whole numbers: of ones, which any table has)."""
    memory = torch.full(
        (x.numel() + 2 * MARGIN,), torch.nan if x.is_floating_point() else 1, dtype=x.dtype, device=x.device
    )
    inside = memory[MARGIN : MARGIN + x.numel()].view(x.shape)
    return Placed(inside.copy_(x), memory)


def strided(x: Tensor) -> Placed:
    """Part of wider rows whose rest is NaN, as a slice of a fused projection is."""
    memory = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    return Placed(memory[..., 8:-8].copy_(x), memory)


def transposed(x: Tensor) -> Placed:
    """First and last axis stand the other way round in memory."""
    memory = x.transpose(0, -1).contiguous()
    return Placed(memory.transpose(0, -1), memory)


def bits(x: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(kinds[x.element_size()]) if x.is_floating_point() else x


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN until it is written: what torch offers under its deterministic mode."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fill = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        filling.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode, warn_only=warn)


def share(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value wanted; infinite where it is not finite."""
    if not wanted.numel():
        return 0.0
    largest = float(wanted.double().abs().max())
    difference = float((found.double() - wanted.double()).abs().max())
    return difference / (largest or 1.0) if difference == difference else float("inf")
