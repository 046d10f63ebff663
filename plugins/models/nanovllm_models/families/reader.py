"""Typed values of a `config.json`, and the refusals that every family shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nanovllm_core.errors import ModelError

_REQUIRED = object()
LAYERS = 10_000  # no model has so many; a config that says more would fill memory with their names


class Reader:
    """Typed values of a config dict; null counts as absent."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"config.json: {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"config.json: {key} is {value!r}, expected {kind.__name__}")
        return value

    def size(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
        value: int = self.value(key, int, default)
        if value < least:
            raise ModelError(f"config.json: {key} is {value}, expected at least {least}")
        if value > most:
            raise ModelError(f"config.json: {key} is {str(value)[:24]}, expected at most {most:,}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        number = self.config.get(key)
        if not isinstance(number, int) or isinstance(number, bool):
            number = self.value(key, float, default)
        if not (math.isfinite(number) and number > 0):
            raise ModelError(f"config.json: {key} is {number}, expected a positive number")
        return float(number)


def refuse(config: Mapping[str, Any], architecture: str, checks: Mapping[str, bool]) -> None:
    """Raise ModelError with the first of `checks` (what is asked for -> whether it is) that holds, or of everyone's."""
    architectures = config.get("architectures") or [architecture]
    everyone = {
        f"architectures {architectures} (supported: {architecture})": architecture not in architectures,
        "quantization_config (quantised weights); take the original model": bool(config.get("quantization_config")),
    }
    for what, present in {**everyone, **checks}.items():
        if present:
            raise ModelError(f"config.json asks for {what}: not supported")
