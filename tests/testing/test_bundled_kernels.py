"""The torch kernels keep their contract."""

from nanovllm_kernels.torch import Torch

from nanovllm_core.testing import KernelContract


class TestTorch(KernelContract):
    component = Torch()
