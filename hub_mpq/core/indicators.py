"""The scores of a model's layers at their candidate bit-widths, as a search strategy found them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .bits import LayerBits

DIVERGENCES = ("kl", "target_error")
"""Units of the divergences of tasks."""
_BEFORE = {"squared change of the loss": "loss", "scale of the quantizer": "scale"}


@dataclass(frozen=True)
class Indicators:
    """The scores of all layers at every candidate bit-width, which serve any number of budgets.

    LIMPQ scores each operand and bit-width separately; a larger value means a layer that needs more bits. Other
    strategies score pairs of weight and input bit-widths.

    Args:
        weight: {layer: {bits: value}} of the weights.
        activation: {layer: {bits: value}} of the inputs, without weight-only layers.
        activation_signed: {layer: whether negative inputs were observed}.
        provenance: How the scores were made, JSON values only: "strategy", "unit", "sense" ("min" if smaller values are
            better, else "max"), "seed", "steps", "inferred" (the bit-widths that training settled on), and others.
        pairs: {layer: {LayerBits: value}}, for strategies that score pairs.

    References:
        LIMPQ (Tang et al., ECCV 2022), §3.2.

    Example:
        >>> from hub_mpq import Indicators
        >>> scores = Indicators({"fc": {2: 0.3, 4: 0.1}}, {"fc": {2: 0.2, 4: 0.05}}, provenance={"unit": "kl"})
        >>> scores.weight["fc"][4], scores.unit, scores.predicts
        (0.1, 'kl', True)
    """

    weight: Mapping[str, Mapping[int, float]]
    activation: Mapping[str, Mapping[int, float]]
    activation_signed: Mapping[str, bool] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[LayerBits, float]] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """The name of the strategy that made the scores."""
        return str(self.provenance.get("strategy", "limpq"))

    @property
    def unit(self) -> str:
        """The unit of the values; "" if it is not known.

        It is "kl" or "target_error" (the divergence of the output that quantizing an operand causes, see `Task.unit`),
        "relative_power" or "scale" (LIMPQ's scales, normalized and raw), or a strategy's own unit. Files written before
        2026-11-28 have "loss" (squared change of the loss) or "scale".
        """
        unit = str(self.provenance.get("unit", ""))
        return _BEFORE.get(unit, unit)

    @property
    def predicts(self) -> bool:
        """Whether the sum of the values estimates the divergence of a policy from the float model."""
        return self.unit in DIVERGENCES

    @property
    def standard_error(self) -> dict[str, float]:
        """{layer: relative standard error of its value at the narrowest bit-widths}, for layers where it is known."""
        found = self.provenance.get("standard_error")
        known = found.items() if isinstance(found, Mapping) else ()
        return {name: value for name, value in known if isinstance(value, float) and 0 <= value < math.inf}

    @property
    def sense(self) -> str:
        """The direction of the values: "min" if smaller ones are better, "max" if larger ones are."""
        return str(self.provenance.get("sense", "min"))

    @property
    def seed(self) -> int:
        """The seed of the search."""
        return int(self.provenance.get("seed", 0))

    @property
    def inferred(self) -> dict[str, LayerBits] | None:
        """The bit-widths of the searched layers that training settled on; None for strategies that need a budget."""
        found = self.provenance.get("inferred")
        return None if found is None else {name: LayerBits.parse(bits) for name, bits in found.items()}
