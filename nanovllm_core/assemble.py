"""From a ModelPlan to a module with weights: built on meta, parallelised, then filled parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm_core.contracts import GENERATION, JOINED, KernelRequest, Module, Ops, Parallelized, Tokenizer
from nanovllm_core.errors import ModelError
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Kernels, Models, Parallel, Tokenizers
from nanovllm_core.plan_model import ModelPlan
from nanovllm_core.training.sharding import is_spread, part, spread_as


def models_of(plan: ModelPlan) -> Models:
    """The model component's hooks."""
    return bind(Models, [(plan.model.entry.full_name, plan.model.component)])


def load_ops(plan: ModelPlan, device: str, *, training: bool) -> Ops:
    """The chosen kernels, loaded."""
    loaded: dict[str, Any] = {}
    for operation, choice in plan.kernels.items():
        request = KernelRequest(
            operation=operation,
            device=device,
            dtype=plan.dtype,
            shape=plan.shape,
            training=training and operation not in GENERATION,
            tensor=plan.layout.tensor,
        )
        loaded[operation] = bind(Kernels, [(choice.entry.full_name, choice.component)]).load(request=request)
    joined = {name: loaded.pop(name) for name in JOINED if name in loaded}
    return Ops(dtype=plan.dtype, joined=joined, **loaded)


def assemble(
    plan: ModelPlan,
    device: str,
    *,
    seed: int,
    training: bool,
    weight: Callable[[str], Tensor] | None = None,
    mesh: Any = None,
) -> Parallelized:
    """The model on `device`: to train in the plan's dtype of weights, to generate in the compute dtype.

    `weight(name)` gives each parameter; without it the model component does (from file, or random by seed).
    """
    models, shape = models_of(plan), plan.shape
    with torch.device("meta"):
        module = models.build(shape=shape, ops=load_ops(plan, device, training=training))
    strategy = bind(Parallel, [(plan.parallel.entry.full_name, plan.parallel.component)])
    parallelized = strategy.parallelize(module=module, layout=plan.layout, mesh=mesh)
    dtype = getattr(torch, plan.weights if training else plan.dtype)
    give = weight or (lambda name: models.weight(shape=shape, name=name, seed=seed))
    # A copy: what a component gives may be a view of the file or of its own cache, and training writes in place.
    fill(parallelized.module, give, device, lambda mine: mine.to(device, dtype, copy=True).contiguous())
    parallelized.ready()
    parallelized.module.train(training)
    if not training:
        lay_side_by_side(parallelized.module)
    return parallelized


def opened(plan: ModelPlan, device: str, weight: Callable[[str], Tensor]) -> Module:
    """The model on one device to generate with, whatever strategy the plan has."""
    with torch.device("meta"):
        module = models_of(plan).build(shape=plan.shape, ops=load_ops(plan, device, training=False))
    dtype = getattr(torch, plan.dtype)
    fill(module, weight, device, lambda value: value.to(device, dtype, copy=True))
    module.train(False)
    lay_side_by_side(module)
    return module


def lay_side_by_side(module: Module) -> None:
    """Let the matrices of each block follow each other in one memory, where kernels may read several as one.

    For generation on a GPU, where a token's products are short. A block's weights exist twice while it is laid out; what they leave
    is given back, since the cache is sized by what is free.
    """
    for block in module.blocks:
        matrices = [p for p in block.parameters() if p.ndim == 2]
        first = matrices[0] if matrices else None
        if first is None or not first.is_cuda or any(is_spread(p) or p.dtype != first.dtype for p in matrices):
            continue
        lay(matrices)
        torch.cuda.empty_cache()


def lay(matrices: Sequence[nn.Parameter]) -> None:
    """Put these into one memory, in order."""
    rest = torch.cat([p.detach().reshape(-1) for p in matrices])
    for p in matrices:
        p.data, rest = rest[: p.numel()].view(p.shape), rest[p.numel() :]


def fill(
    module: Module, weight: Callable[[str], Tensor], device: str, place: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> None:
    """Replace every meta parameter by this rank's part of `weight(name)`; one that stands in several places stays one.

    `place` makes the part a tensor of the module's own.
    Buffers hold what the module computed when it was built, and move to the device.
    """
    assert isinstance(module, nn.Module)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    raise ModelError(
                        f"buffer {key!r} of {type(owner).__name__} was left on meta by the model's `build`"
                    )
                owner._buffers[key] = buffer.to(device)
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, key))
    for name, old in list(module.named_parameters()):
        value = weight(name)
        if value.shape != old.shape:
            raise ModelError(f"{name}: got shape {tuple(value.shape)}, the model needs {tuple(old.shape)}")
        new = nn.Parameter(spread_as(old, place(part(value, old))), requires_grad=old.requires_grad)
        for owner, key in places[id(old)]:
            owner._parameters[key] = new


def tokenizer_of(plan: ModelPlan, texts: Callable[[], Iterable[str]], kept: Path | None = None) -> Tokenizer:
    """The tokenizer, made from `texts()` where the component builds a vocabulary and finds none in `kept`."""
    component = bind(Tokenizers, [(plan.tokenizer.entry.full_name, plan.tokenizer.component)])
    return component.make(texts=texts, vocab_size=plan.vocabulary.value, kept=kept)
