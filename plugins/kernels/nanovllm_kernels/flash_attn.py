"""The `flash_attn` kernel: attention over packed documents by the FlashAttention packages, where one is installed.

`flash-attn-4` (Hopper and newer, compiled on first use, some seconds) goes before `flash-attn` 2. Documents of a batch are told
by their running lengths, so any mixture of lengths is one call and nothing is built anew for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from typing import Any, Literal

from attrs import frozen

from nanovllm_core.contracts import Accept, KernelRequest, Refuse, Verdict
from nanovllm_core.hookspecs import hookimpl
from nanovllm_kernels.refusals import fails, not_bf16_attention_on_cuda

PACKAGES = {4: "flash-attn-4", 2: "flash-attn"}
LARGEST = {4: 128, 2: 256}  # head size
OLDEST = {4: (9, 0), 2: (8, 0)}  # compute capability
PRIORITY = {4: 30, 2: 10}  # on an H100 65 ms a step against 108, on packed documents 51 against 68; torch_varlen has 5


@frozen(kw_only=True, eq=False)
class FlashAttn:
    """Attention by FlashAttention 4 or 2, whichever is installed, in bf16.

    version: 4 or 2; null: the newest that is installed
    """

    version: Literal[2, 4] | None = None

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        """Refuses what the installed build lacks, as a trial says."""
        if reason := not_bf16_attention_on_cuda(request, max(LARGEST.values())):
            return Refuse(reason)
        if not request.training:  # and to try the package may import for seconds
            return Refuse("generation reads pages, which `paged_attention` does")
        reasons = self._lacks(request)
        for version, reason in reasons.items():
            if not reason:
                installed = metadata.version(PACKAGES[version])
                return Accept(PRIORITY[version], f"{PACKAGES[version]} {installed}, any mixture of lengths in one call")
        return Refuse("; ".join(reasons.values()))

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        """`attention(q, k, v, batch, window)`."""
        from functools import partial

        from nanovllm_kernels import packed_attention

        version = next(version for version, reason in self._lacks(request).items() if not reason)
        return partial(packed_attention.attention, packed_attention.FLASH[version])

    def _lacks(self, request: KernelRequest) -> dict[int, str]:
        """Each version that may be taken, the preferred first -> why it cannot be; empty when it can."""
        wanted = [self.version] if self.version else list(PACKAGES)
        return {version: _lacks(version, request.shape.head_dim) for version in wanted}


@lru_cache
def _lacks(version: int, head_dim: int) -> str:
    """Why this version cannot be used here; empty when it can."""
    import torch

    package = PACKAGES[version]
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST[version]:
        return f"{package} needs a GPU of compute capability {'.'.join(map(str, OLDEST[version]))} or newer"
    if head_dim > LARGEST[version]:
        return f"{package} takes heads of up to {LARGEST[version]}, not {head_dim}"
    return fails(package, lambda device: _try(version, head_dim, device))


def _try(version: int, head_dim: int, device: str) -> None:
    """FlashAttention 2 is called with one token, for builds differ; 4 is only loaded: a call compiles for seconds."""
    import torch

    from nanovllm_kernels import packed_attention

    if version == 4:
        packed_attention.load_flash_4()
        return
    x = torch.zeros(1, 1, head_dim, dtype=torch.bfloat16, device=device)
    packed_attention.flash_2(x, x, x, torch.tensor([0, 1], dtype=torch.int32, device=device), 1, None)
