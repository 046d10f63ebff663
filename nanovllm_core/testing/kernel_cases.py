"""What all tests of kernels share: which requests are tried, and how an answer is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import SkipTest

from attrs import evolve

from nanovllm_core.contracts import GENERATION, JOINED, OPERATIONS, Accept, KernelRequest, Shape
from nanovllm_core.hookspecs import Kernels
from nanovllm_core.testing.contract import Contract

if TYPE_CHECKING:
    from nanovllm_core.testing.kernel_calls import Call

DTYPES = ("float32", "bfloat16")


def outline(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab_size: int) -> Shape:
    """The shape of a model that kernels are tried for."""
    return Shape(
        family="kit", vocab_size=vocab_size, layers=2, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate=intermediate, tied=True, max_positions=512, parameters=1, operations=OPERATIONS,
    )  # fmt: skip


SHAPES = (
    outline(48, 4, 2, 12, 63, 97),
    outline(65, 3, 1, 32, 130, 257),
    outline(256, 4, 4, 64, 512, 1000),
    outline(128, 4, 2, 128, 256, 640),
)
LENGTHS = ((5, 1, 9), (8, 8, 8), (130, 3))  # of packed documents


class KernelTests(Contract):
    kind = "kernels"
    operations: Sequence[str] = ()
    devices: Sequence[str] = ()
    shapes: Sequence[Shape] = SHAPES
    tolerances: ClassVar[Mapping[str, float]] = MappingProxyType({"float32": 2e-5, "bfloat16": 2e-2})

    def here(self) -> list[str]:
        """The devices of this machine that are tried."""
        import torch

        found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        tried = [d for d in self.devices or found if d in found]
        if not tried:
            raise SkipTest(f"this machine has none of {', '.join(self.devices)}")
        return tried

    def requests(self, *operations: str, training: bool = True, window: int | None = None) -> list[KernelRequest]:
        """All requests for these operations (none given: all) that its probe accepts."""
        probe = self.bound(Kernels).probe
        found = []
        for name in operations or ((*OPERATIONS, *JOINED) if training else (*OPERATIONS, *GENERATION, *JOINED)):
            if self.operations and name not in self.operations:
                continue
            for device in self.here():
                for dtype in DTYPES:
                    for shape in self.shapes:
                        windowed = shape if window is None else evolve(shape, window=window)
                        request = KernelRequest(
                            operation=name, device=device, dtype=dtype, shape=windowed, training=training
                        )
                        if isinstance(self.verdict(str(request), probe, request=request), Accept):
                            found.append(request)
        if operations and not found:
            what = "" if window is None else " with a window"
            raise SkipTest(f"it implements no {' or '.join(operations)}{what} here")
        return found

    def load(self, request: KernelRequest) -> Callable[..., Any]:
        return self.bound(Kernels).load(request=request)

    def same(self, request: KernelRequest, call: Call, rule: str, *, by: float = 1, one_by_one: bool = False) -> None:
        """Outputs and gradients of the kernel beside those of the definition."""
        from nanovllm_core.testing.kernel_calls import answer, defined

        function = self.load(request)
        leaves = call.leaves if request.training else ()
        for wanted in [leaves, *([(i,) for i in leaves] if one_by_one and len(leaves) > 1 else [])]:
            told = self.named(request, call) + (f", differentiated by argument {wanted}" if wanted != leaves else "")
            found, right = answer(function, call, wanted), defined(request.operation, call, wanted)
            for i, (output, b) in enumerate(zip(found.outputs, right.outputs, strict=True)):
                self.alike(request, output, b, f"{told}: output {i}", rule, by)
            for i, gradient, g in zip(wanted, found.gradients, right.gradients, strict=True):
                if not call.args[i].numel():
                    continue  # nothing to differentiate by
                self.check(gradient is not None, f"{told}: argument {i} has no gradient", rule)
                self.alike(request, gradient, g, f"{told}: the gradient of argument {i}", rule, by)

    def alike(self, request: KernelRequest, found: Any, wanted: Any, told: str, rule: str, by: float = 1) -> None:
        from nanovllm_core.testing.kernel_calls import share

        sizes = f"{told} has shape {list(found.shape)}, expected {list(wanted.shape)}"
        self.check(found.shape == wanted.shape, sizes, rule)
        off, allowed = share(found, wanted), by * self.tolerances[request.dtype]
        self.check(off <= allowed, f"{told} is off by {off:.1e} of its largest value (allowed {allowed:.0e})", rule)

    def named(self, request: KernelRequest, call: Call) -> str:
        sizes = [list(a.shape) for a in call.args if hasattr(a, "shape")]
        shown = " ".join(f"{k}={v}" for k, v in call.kwargs.items())
        return (
            f"{request.operation} {call.label} {shown} on {request.device} in {request.dtype}, inputs {sizes}".replace(
                "  ", " "
            )
        )
