"""What readers give for real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm_core.contracts import Damage, Record, Source
from nanovllm_core.hooks import bind
from nanovllm_core.hookspecs import Readers

Read = Callable[[object, Path], list[Record | Damage]]


@pytest.fixture(scope="session")
def read() -> Read:
    """All that a reader component gives for a file."""

    def read(component: object, path: Path) -> list[Record | Damage]:
        source = Source(path=str(path), name=path.name, size=path.stat().st_size)
        return list(bind(Readers, [("reader", component)]).read(source=source))

    return read
