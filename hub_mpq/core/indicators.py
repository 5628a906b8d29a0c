"""Learned importance: one scale per layer and width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Indicators:
    """Scales of jointly trained quantizers (LIMPQ §3.2): a larger scale means a layer that needs more bits.

    `weight`, `activation`: {layer name: {bits: scale}}. A weight-only layer has no activation row.
    `activation_signed`: whether each layer's input was seen below zero.
    `provenance`: how they were made (strategy, steps, seed, movement from the start, …), JSON values only.
    """

    weight: Mapping[str, Mapping[int, float]]
    activation: Mapping[str, Mapping[int, float]]
    activation_signed: Mapping[str, bool] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
