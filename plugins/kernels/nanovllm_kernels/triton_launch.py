"""What launches of the Triton kernels share: rows of a tensor, and how many programs walk over them.

Triton compiles a kernel for each class of a whole number that it is called with (one, a multiple of 16, any other), and of an
address, unless it is told not to (`do_not_specialize`): numbers of tokens differ from batch to batch, so kernels that take them
are told.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PER_PROCESSOR = 4  # programs of a kernel whose programs walk over many rows
LINE = 128  # bytes that are fetched at once
ON_CPU = 3  # in the interpreter: few, so that tests meet programs with several tiles


def rows_of(x: Tensor) -> Tensor:
    """[R, C], its columns side by side; a copy only where a view cannot be that."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def programs(device: torch.device, tiles: int) -> int:
    """How many programs share so many tiles."""
    return min(tiles, PER_PROCESSOR * processors(device) if device.type == "cuda" else ON_CPU)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def launch_early(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that comes to the device before the one in front of it is done, and waits by itself: since Hopper."""
    early = device.type == "cuda" and bool(torch.version.cuda) and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def fetch(pointers):
    """Let what stands there come to the L2 cache: its line of each pointer."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel come, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
