"""The Triton kernels: on a GPU under the whole kit; anywhere, on small calls, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nanovllm_kernels.triton import SOURCES, Triton

from nanovllm_core.testing import KernelContract


class TestTriton(KernelContract):
    component = Triton()
    operations = tuple(SOURCES)
    devices = ("cuda",)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (there is none but for Linux)")
def test_small_calls() -> None:
    """Without a GPU in Triton's interpreter, for which no process may have imported triton before."""
    given = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(Path(__file__).with_name(name)) for name in ("triton_cases.py", "triton_sampling_cases.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | given, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 2 * len(SOURCES) + 15
