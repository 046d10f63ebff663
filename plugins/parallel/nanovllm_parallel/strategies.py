"""The strategies: thin classes over one function of a mesh (`spread`)."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import ge, optional

from nanovllm_core.contracts import Accept, Layout, Module, Parallelized, ParallelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl

FULL = 0.9  # of the free memory may be planned for
MUCH = 4_000_000_000  # bytes of a whole model in bf16 (measured on two H100s, 0.6 B kept gathered: 2 % faster, 0.8 GiB more)
DEGREE = optional(ge(1))
ORDER = "train.deterministic is kept by single and ddp alone: sums over shards and slices have an order of their own"


def _gigabytes(request: ParallelRequest) -> str:
    return f"{request.memory_needed / 1e9:.1f} GB a device of {request.memory_available / 1e9:.1f} GB free"


def _fits(request: ParallelRequest) -> bool:
    return not request.memory_available or request.memory_needed <= FULL * request.memory_available


def _uneven(request: ParallelRequest, tensor: int) -> str:
    """Why a model cannot be split so; empty when it can."""
    for what in ("heads", "kv_heads"):
        count = getattr(request.shape, what)
        if count < 1 or count % tensor:
            return f"the model's {count} {what} do not split into {tensor} equal parts"
    return ""


class _Spread:
    """What all do with a module."""

    @hookimpl
    def parallelize(self, module: Module, layout: Layout, mesh: object) -> Parallelized:
        from nanovllm_parallel.spread import spread

        return spread(module, layout, mesh)


@frozen(kw_only=True, eq=False)
class Ddp(_Spread):
    """The whole model on every device, each with documents of its own."""

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        if request.deterministic and request.world_size & (request.world_size - 1):
            return Refuse(f"train.deterministic sums over 1, 2, 4, 8, ... ranks; there are {request.world_size}")
        layout = Layout(data=request.world_size, ordered=request.deterministic)
        if _fits(request):
            return Accept(20, f"the whole model fits: {_gigabytes(request)}", layout)
        return Accept(5, f"the whole model may not fit: {_gigabytes(request)}", layout)


@frozen(kw_only=True, eq=False)
class Fsdp(_Spread):
    """Parameters, gradients and optimizer sharded over the devices (FSDP2).

    shard: devices that hold a model together (default: all of them); what that leaves are replicas
    reshard_after_forward: put a block's parameters away after its forward and gather them again for its backward; null: where
      a whole model in bf16 has more than 4 GB
    """

    shard: int | None = field(default=None, validator=DEGREE)
    reshard_after_forward: bool | None = None

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        if request.deterministic:
            return Refuse(ORDER)
        world = request.world_size
        shard = self.shard or world
        if world % shard:
            return Refuse(f"{world} processes are no multiple of shard {shard}")
        layout = Layout(world // shard, shard, reshard=_reshard(request, self.reshard_after_forward))
        return Accept(10, f"a shard of the model on each of {shard} devices", layout)


@frozen(kw_only=True, eq=False)
class Tensor(_Spread):
    """Every matrix split over devices, which work on the same documents.

    size: devices that hold a model together (default: all of them); what that leaves are replicas, or shards
    """

    size: int | None = field(default=None, validator=DEGREE)

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        return _laid_out(request, None, 1 if _fits(request) else None, self.size or request.world_size)


@frozen(kw_only=True, eq=False)
class Mesh(_Spread):
    """Any product of replicas, shards and tensor slices that equals the number of processes.

    data: copies of the model
    shard: devices that hold the shards of one copy; of data and shard, one left out takes what is left (both: shard,
      where a whole model may not fit, else data)
    tensor: devices that hold the slices of one matrix
    reshard_after_forward: put a block's parameters away after its forward and gather them again for its backward; null: where
      a whole model in bf16 has more than 4 GB
    """

    data: int | None = field(default=None, validator=DEGREE)
    shard: int | None = field(default=None, validator=DEGREE)
    tensor: int = field(default=1, validator=ge(1))
    reshard_after_forward: bool | None = None

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        shard = 1 if self.shard is None and self.data is None and _fits(request) else self.shard
        return _laid_out(request, self.data, shard, self.tensor, self.reshard_after_forward)


def _reshard(request: ParallelRequest, asked: bool | None) -> bool:
    return 2 * request.shape.parameters > MUCH if asked is None else asked


def _laid_out(
    request: ParallelRequest, data: int | None, shard: int | None, tensor: int, reshard: bool | None = None
) -> Verdict:
    """What is left of the world goes to `data`, or `shard`, whichever is None; where both are, to `shard`."""
    if request.deterministic:
        return Refuse(ORDER)
    product = (data or 1) * (shard or 1) * tensor
    rest, over = divmod(request.world_size, product)
    if over or (rest > 1 and data is not None and shard is not None):
        return Refuse(
            f"{data or 1} x {shard or 1} x {tensor} does not make up {request.world_size} processes; start as many as that "
            "makes (--nproc, torchrun)"
        )
    if tensor > 1 and (why := _uneven(request, tensor)):
        return Refuse(why)
    replicas = data or (rest if shard is not None else 1)
    layout = Layout(replicas, shard or rest, tensor, reshard=_reshard(request, reshard))
    return Accept(-1, f"{layout.data} replicas x {layout.shard} shards x {layout.tensor} tensor slices", layout)
