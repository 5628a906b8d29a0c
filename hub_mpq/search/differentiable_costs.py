"""Budgets as differentiable costs, for strategies that learn bit-widths with a penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Candidates, LayerGraph, Limit, Reduction

Widths = Mapping[str, tuple[Tensor, "Tensor | None"]]
"""`{searched layer: (weight bits, activation bits)}`: real numbers that may carry gradients."""


class DifferentiableCosts:
    """Costs of real-valued bit-widths, relative to each limit: 1 at the cap.

    Args:
        graph: The layers of the model.
        limits: `{name: (limit, cap on the total of the searched layers)}`, as returned by `searched_limits`. A limit
            without a `Reduction`, such as a custom table, has no gradient and is left to the solver.
    """

    def __init__(self, graph: LayerGraph, limits: Mapping[str, tuple[Limit, float]]) -> None:
        self.layers = {layer.name: layer for layer in graph.searched}
        found = {name: (limit.reduction(graph), cap) for name, (limit, cap) in limits.items()}
        self.limits = {name: (r, cap) for name, (r, cap) in found.items() if r is not None and cap > 0}

    def ratios(self, widths: Widths) -> dict[str, Tensor]:
        """Return `{limit: amount / cap}`."""
        return {name: evaluate(r, widths) / cap for name, (r, cap) in self.limits.items()}

    def over(self, widths: Widths, power: int = 1) -> Tensor:
        """Compute Σ relu(amount/cap − 1)^power over the limits; 0 without limits.

        The excess is relative, so that one strength fits all limits, which is our construction.
        """
        terms = [torch.relu(ratio - 1) ** power for ratio in self.ratios(widths).values()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def affordable(self, widths: Iterable[int], candidates: Mapping[str, Candidates]) -> int:
        """Return the widest of `widths` that meets the limits in all layers, clamped to the candidates of each layer.

        If none does, return the narrowest.
        """

        def level(bits: int, of: Sequence[int]) -> Tensor:
            return torch.tensor(float(min(max(bits, of[0]), of[-1])))

        def fits(bits: int) -> bool:
            taken = {
                n: (level(bits, candidates[n].weight), None if x.weight_only else level(bits, candidates[n].activation))
                for n, x in self.layers.items()
            }
            return all(float(ratio) <= 1 + 1e-6 for ratio in self.ratios(taken).values())

        tried = set(widths)
        return max((b for b in tried if fits(b)), default=min(tried))


def evaluate(reduction: Reduction, widths: Widths) -> Tensor:
    """Compute the cost of layers of these bit-widths."""
    rows = []
    for name, (weight, activation) in widths.items():
        if reduction.activation and activation is None:
            continue
        amount: Any = reduction.coefficients[name]
        amount = amount * weight if reduction.weight else amount
        rows.append(amount * activation if reduction.activation else amount)
    if not rows:
        return torch.full((), float(reduction.constant))
    taken = torch.stack(rows)
    return (taken.max() if reduction.over == "max" else taken.sum()) + reduction.constant
