"""Each rank holds a shard of every parameter, gradient and moment: torch's fully_shard (FSDP2), block by block.

Compute in bf16 gathers bf16 and reduces gradients in fp32; the shards are fp32 masters, or bf16 as well. Gradients are
reduced after every micro-batch, so no rank ever holds them whole: that costs a reduction a micro-batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nanovllm_core.contracts import Batch, Layout, Module
from nanovllm_parallel.spread import Group


class Sharded(Group):
    """`Parallelized` over shards, with or without replicas and tensor slices."""

    def __init__(self, module: Module, layout: Layout, mesh: Any) -> None:
        super().__init__(module, layout, mesh)
        over = mesh["shard"] if layout.data == 1 else mesh["data", "shard"]
        compute = getattr(torch, module.ops.dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        assert isinstance(module, nn.Module)
        for block in (*module.blocks, module):
            fully_shard(
                block, mesh=over, mp_policy=policy, reshard_after_forward=layout.reshard and block is not module
            )
        self.sharded: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in self.sharded:
            part.set_gradient_divide_factor(1.0)  # the sum, not the mean
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """FSDP takes over whether a parameter trains when it gathers it first; what thaws later must be told."""
        for part in self.sharded:
            state = part._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                for held in group.fsdp_params if group is not None else ():
                    gathered = getattr(held, "_unsharded_param", None)
                    if gathered is not None and gathered.requires_grad != held.sharded_param.requires_grad:
                        gathered.requires_grad_(held.sharded_param.requires_grad)
        return nullcontext()

    def __call__(self, tokens: Tensor, batch: Batch, targets: Tensor) -> Tensor:
        loss = super().__call__(tokens, batch, targets)
        if not torch.is_grad_enabled():
            for part in self.sharded:
                part.reshard()  # a backward would: what the module holds are shards again
        return loss
