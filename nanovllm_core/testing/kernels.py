"""Kernels."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm_core.testing.contract import Contract


class KernelContract(Contract):
    """A component of kernels.

    operations: those that it implements; none: whatever its probe accepts
    devices: those that it is tried on; none: whatever its probe accepts on this machine
    """

    kind = "kernels"
    operations: Sequence[str] = ()
    devices: Sequence[str] = ()
