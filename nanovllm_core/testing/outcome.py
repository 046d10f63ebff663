"""Running a contract without pytest."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from unittest import SkipTest

from nanovllm_core.testing.contract import Contract


def failures(contract: type[Contract]) -> dict[str, str]:
    """Name -> message of each test that fails, in the order of the names; empty when all pass (or do not apply)."""
    found: dict[str, str] = {}
    for name in sorted(n for n in dir(contract) if n.startswith("test_")):
        test = getattr(contract(), name)
        with tempfile.TemporaryDirectory(prefix="contract-", ignore_cleanup_errors=True) as folder:
            given = {"tmp_path": Path(folder)} if "tmp_path" in inspect.signature(test).parameters else {}
            try:
                test(**given)
            except SkipTest:
                continue
            except AssertionError as e:
                found[name] = str(e)
            except Exception as e:  # a component may raise anything; that is a failure like any other
                found[name] = f"{type(e).__name__}: {e}"
    return found
