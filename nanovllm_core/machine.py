"""The machine that a plan is made for: a value, so that a plan for another machine can be made and tested anywhere."""

from __future__ import annotations

import os

from attrs import evolve, frozen


@frozen(kw_only=True)
class Machine:
    """One process's view of its host."""

    device: str = "cpu"  # "cpu" | "cuda"
    device_name: str = ""
    memory: int = 0  # bytes free on the device; 0 when unknown
    cores: int = 1  # usable by this process
    bf16: bool = True  # multiplied by instructions of the device; false: emulated, slower than fp32
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0

    @classmethod
    def detect(cls, processes: int | None = None) -> Machine:
        """What is here: the first visible GPU (or this rank's), else the CPU. Ranks as torchrun tells them, or as the first
        of so many `processes` would see it."""
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        world_size, rank, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
        )
        if processes is not None:
            world_size, rank, local_rank = processes, 0, 0
        here = cls(cores=cores, world_size=world_size, rank=rank, local_rank=local_rank)
        if not torch.cuda.is_available():
            shared = processes or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # among processes of this host
            return evolve(here, device_name=f"{cores} cores", memory=host_memory() // shared, bf16=_cpu_has_bf16())
        index = local_rank % torch.cuda.device_count()
        free, _total = torch.cuda.mem_get_info(index)
        return evolve(here, device="cuda", device_name=torch.cuda.get_device_name(index), memory=free)


def _cpu_has_bf16() -> bool:
    """What torch can tell: of x86 since 2.12, of others nothing; true when it is not known."""
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") != "x86_64" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def host_memory() -> int:
    """Bytes that may be used now (what the system caches of files counts as free); 0 when unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for text in file:
                if text.startswith("MemAvailable:"):
                    return int(text.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
