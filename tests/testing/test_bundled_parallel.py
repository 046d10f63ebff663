"""Bundled strategies keep their contract; a strategy over two processes shows that the contract can be kept there."""

from __future__ import annotations

from nanovllm_parallel.single import Single

from nanovllm_core.testing import ParallelContract


class TestSingle(ParallelContract):
    component = Single()
