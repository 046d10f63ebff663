"""One process, one device."""

from __future__ import annotations

from attrs import frozen

from nanovllm_core.contracts import Accept, Layout, Module, Parallelized, ParallelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl


@frozen(kw_only=True, eq=False)
class Single:
    """One process on one device: the plain case."""

    @hookimpl
    def probe(self, request: ParallelRequest) -> Verdict:
        if request.world_size != 1:
            return Refuse(f"runs on one process; there are {request.world_size}")
        return Accept(priority=30, why="one process", layout=Layout(ordered=request.deterministic))

    @hookimpl
    def parallelize(self, module: Module, layout: Layout, mesh: object) -> Parallelized:
        from nanovllm_parallel.spread import spread

        return spread(module, layout, mesh)
