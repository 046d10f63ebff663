"""Freed tensors go back to the system.

glibc learns from each freed block: after the first gradient of 30 MB it keeps every block up to that size in its heap, where
activations and gradients, which come and go in turn, leave holes that nothing fits. A model of 109 M parameters grew to
3.2 GB in three steps, and on with more, where its tensors need 2.2 GB; with a fixed threshold of 4 MiB it took 2.3 GB.
Pages that come anew must be cleared: some 7 % more processor time for a model of 4 M parameters, so small runs go without.
"""

from __future__ import annotations

import contextlib
import os
import sys

M_MMAP_THRESHOLD, SIZE = -3, 4 * 2**20
WORTH = 10**9  # bytes of a run from which it pays


def give_back() -> None:
    """Let blocks of 4 MiB and more be the system's as soon as they are freed, in this process, where its C library is glibc.

    What the user set by the environment (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) stays.
    """
    if sys.platform != "linux" or {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, SIZE)
