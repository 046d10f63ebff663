"""The strategy, by nano-vllm's conformance kit, on one rank and in worlds of two and three processes."""

from nanovllm_flat.component import Flat

from nanovllm_core.testing import ParallelContract


class TestFlat(ParallelContract):
    component = Flat()
    worlds = (1, 2, 3)
