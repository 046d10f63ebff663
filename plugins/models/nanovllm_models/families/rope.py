"""Rotary positions in a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm_core.errors import ModelError
from nanovllm_models.config import Rope
from nanovllm_models.families.reader import Reader

KINDS = ("default", "linear", "llama3")


def rope_of(config: Mapping[str, Any], max_positions: int) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
        raise ModelError(f"config.json: rotary parameters {given!r} are not one flat object")
    read = Reader(given)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise ModelError(f"config.json asks for rope_type {kind!r}: not supported; supported: {', '.join(KINDS)}")
    for part in (given.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise ModelError(f"config.json asks for partial_rotary_factor {part}: not supported")
    theta = read.number("rope_theta", Reader(config).number("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=read.number("factor"))
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    rope = Rope(
        theta=theta,
        kind=kind,
        factor=read.number("factor"),
        low_factor=read.number("low_freq_factor"),
        high_factor=read.number("high_freq_factor"),
        original=Reader({"original_max_position_embeddings": original}).size(
            "original_max_position_embeddings", max_positions
        ),
    )
    if rope.high_factor <= rope.low_factor:
        low, high = rope.low_factor, rope.high_factor
        raise ModelError(f"config.json: high_freq_factor {high} must exceed low_freq_factor {low}")
    return rope
