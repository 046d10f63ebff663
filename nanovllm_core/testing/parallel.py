"""Parallel strategies."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm_core.testing.contract import Contract


class ParallelContract(Contract):
    """A parallel strategy.

    worlds: numbers of ranks that it is run on; more than one means real processes, with gloo
    """

    kind = "parallel"
    worlds: Sequence[int] = (1,)
