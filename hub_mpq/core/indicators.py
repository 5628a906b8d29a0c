"""What a search strategy found out about every layer: the scores that the solver adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .bits import LayerBits

DIVERGENCES = ("kl", "target_error")
"""Units of a task's divergence."""
_BEFORE = {"squared change of the loss": "loss", "scale of the quantizer": "scale"}


@dataclass(frozen=True)
class Indicators:
    """Scores of layers at every candidate width, by whatever strategy; they serve any number of budgets.

    LIMPQ gives one value for each operand and width (§3.2: a larger one means a layer that needs more bits). Other
    strategies score pairs of widths.

    Args:
        weight: {layer name: {bits: value}} of weights.
        activation: The same of inputs; a weight-only layer has no row.
        activation_signed: Whether each layer's input was seen below zero.
        provenance: How they were made, JSON values only: "strategy", "unit" of the values, "sense" ("min" when a
            smaller one is better), "seed", "steps", "inferred" (widths that training settled on), and so on.
        pairs: {layer name: {LayerBits: value}} of strategies that score pairs.
    """

    weight: Mapping[str, Mapping[int, float]]
    activation: Mapping[str, Mapping[int, float]]
    activation_signed: Mapping[str, bool] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[LayerBits, float]] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """Name of the strategy that made them."""
        return str(self.provenance.get("strategy", "limpq"))

    @property
    def unit(self) -> str:
        """What the values are counted in: "kl" or "target_error" (the divergence of the output that quantizing an
        operand causes, see `Task.unit`), "relative_power" or "scale" (LIMPQ's scales without their unit, and raw), or a
        strategy's own. Files of before 2026-11-28 have "loss" (squared change of the loss) or "scale". "" where it is
        not known."""
        unit = str(self.provenance.get("unit", ""))
        return _BEFORE.get(unit, unit)

    @property
    def predicts(self) -> bool:
        """Whether the sum of the values estimates the divergence of a policy from the float model."""
        return self.unit in DIVERGENCES

    @property
    def standard_error(self) -> dict[str, float]:
        """{layer: relative standard error of its value at the narrowest widths}, of the layers where it is known."""
        found = self.provenance.get("standard_error")
        known = found.items() if isinstance(found, Mapping) else ()
        return {name: value for name, value in known if isinstance(value, float) and 0 <= value < math.inf}

    @property
    def sense(self) -> str:
        """ "min" when a smaller value is better, "max" when a larger one is."""
        return str(self.provenance.get("sense", "min"))

    @property
    def seed(self) -> int:
        """Seed of the search."""
        return int(self.provenance.get("seed", 0))

    @property
    def inferred(self) -> dict[str, LayerBits] | None:
        """Widths that training settled on, of the searched layers; None for strategies that need a budget."""
        found = self.provenance.get("inferred")
        return None if found is None else {name: LayerBits.parse(bits) for name, bits in found.items()}
