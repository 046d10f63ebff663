"""Sums over rows in fp32: of gradients for a bias, of programs' partial sums for a norm's weight.

torch's own reduction takes 16 us for 528 rows of 1,024, which a step of 28 blocks meets 113 times (docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_kernels.triton_launch import rows_of

ROWS, BLOCK = 64, 32  # of a tile
ONCE, PARTS = 1024, 64  # rows that one program walks over; else so many share them, and their sums are summed


@triton.jit(do_not_specialize=["rows", "share"])
def _columns(x_ptr, out_ptr, rows, columns, stride, share, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(1)
    last = tl.minimum((part + 1) * share, rows)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(part * share, last, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        inside = (row < last) & (column < columns)
        total += tl.sum(tl.load(x_ptr + row.to(tl.int64) * stride + column, inside, 0.0).to(tl.float32), 0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + part * columns + column, total, column < columns)


def column_sums(x_RC: Tensor) -> Tensor:
    """[C] in fp32, always added in one order."""
    x_RC = rows_of(x_RC)
    rows, columns = x_RC.shape
    parts = 1 if rows <= ONCE else PARTS
    out_PC = torch.empty(parts, columns, dtype=torch.float32, device=x_RC.device)
    if columns:
        _columns[(triton.cdiv(columns, BLOCK), parts)](
            x_RC, out_PC, rows, columns, x_RC.stride(0), triton.cdiv(rows, parts), ROWS=ROWS, BLOCK=BLOCK
        )
    return out_PC[0] if parts == 1 else column_sums(out_PC)
