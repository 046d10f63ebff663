"""What results of the CPU benchmarks share: the processor's name, and how they are written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures where a path is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
