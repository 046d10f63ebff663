"""Every rank holds the whole model: torch's DistributedDataParallel, with gradients summed instead of averaged.

Annotations are evaluated here: torch looks at those of the hook.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nanovllm_core.contracts import Batch, Layout, Module
from nanovllm_parallel.spread import Group


class Replicated(Group):
    """`Parallelized` over replicas. The wrapper is made anew when other parameters train than before."""

    def __init__(self, module: Module, layout: Layout, mesh: Any) -> None:
        super().__init__(module, layout, mesh)
        self.group = mesh.get_group("data")
        self.wrapper: DistributedDataParallel | None = None
        self.trained: tuple[bool, ...] = ()

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().__call__(tokens, batch, targets)
        loss: Tensor = self._wrapped()(tokens, batch, targets=targets)
        return loss

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped().no_sync()

    def _wrapped(self) -> DistributedDataParallel:
        trained = tuple(p.requires_grad for _, p in self.module.named_parameters())
        if self.wrapper is None or trained != self.trained:
            assert isinstance(self.module, nn.Module)
            self.wrapper = DistributedDataParallel(
                self.module, process_group=self.group, init_sync=False, gradient_as_bucket_view=True
            )
            self.wrapper.register_comm_hook(self.group, _sum)
            self.trained = trained
        return self.wrapper


def _sum(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    work = distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]
