"""Arithmetic that gives the same bits every time, at a price in speed."""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def deterministically(device: str) -> None:
    """Let torch take deterministic algorithms from here on, for the whole process.

    On a CPU one thread: how a sum is shared out among threads changes its bits.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS looks at it when it is used first
    torch.use_deterministic_algorithms(True)
    if device == "cpu":
        torch.set_num_threads(1)
