"""Bundled strategies keep their contract, on one rank and in worlds of real processes."""

from __future__ import annotations

from nanovllm_parallel.single import Single
from nanovllm_parallel.strategies import Ddp, Fsdp, Mesh, Tensor

from nanovllm_core.testing import ParallelContract


class TestSingle(ParallelContract):
    component = Single()


class TestDdp(ParallelContract):
    component = Ddp()
    worlds = (3,)


class TestFsdp(ParallelContract):
    component = Fsdp()
    worlds = (2,)


class TestReplicasOfShards(ParallelContract):
    component = Fsdp(shard=2, reshard_after_forward=False)
    worlds = (4,)


class TestTensor(ParallelContract):
    component = Tensor()
    worlds = (2,)


class TestMesh(ParallelContract):
    component = Mesh(shard=2, tensor=2)
    worlds = (4,)


class TestReplicasOfSlices(ParallelContract):
    component = Mesh(data=2, shard=1, tensor=2)
    worlds = (4,)
