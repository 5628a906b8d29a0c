"""Budgets as differentiable costs, for strategies that learn widths under a penalty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core import Candidates, LayerBits, LayerGraph
from ..cost.size import layer_nbytes

Widths = Mapping[str, tuple[Tensor, "Tensor | None"]]
"""{searched layer: (weight bits, activation bits)}: real numbers that may carry gradients."""


class DifferentiableCosts:
    """Cost of real-valued widths over each limit: 1 where the cap is reached.

    limits: caps on the searched layers' sums, as `searched_limits` gives them. Known are bitops, size, weight_bits,
    compression, activation_memory, activation_peak; a named cost of the user's has no gradient and is left to the ILP.
    """

    def __init__(self, graph: LayerGraph, limits: Mapping[str, float]) -> None:
        self.layers = {layer.name: layer for layer in graph.searched}
        self.amounts = {
            "bitops": self._bitops,
            "size": self._size,
            "weight_bits": self._weight_bits,
            "compression": self._weight_bits,
            "activation_memory": self._activation_memory,
            "activation_peak": self._activation_peak,
        }
        self.limits = {name: cap for name, cap in limits.items() if name in self.amounts and cap > 0}
        self.counts = {n: 0 if x.weight_owner else x.weight_count for n, x in self.layers.items()}
        # scales and shapes beside the bits
        self.beside = sum(layer_nbytes(x, LayerBits(8, 8)) - self.counts[n] for n, x in self.layers.items())

    def ratios(self, widths: Widths) -> dict[str, Tensor]:
        """{limit: amount / cap}."""
        return {name: self.amounts[name](widths) / cap for name, cap in self.limits.items()}

    def over(self, widths: Widths, power: int = 1) -> Tensor:
        """Σ over limits of relu(amount/cap − 1)^power;0 without limits. Relative: one strength fits all [ours]."""
        terms = [torch.relu(ratio - 1) ** power for ratio in self.ratios(widths).values()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def affordable(self, widths: Iterable[int], candidates: Mapping[str, Candidates]) -> int:
        """The widest of `widths` that all layers may take together within the limits, each between its own least and
        greatest candidate; the narrowest of `widths` when none fits."""

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

    def _bitops(self, widths: Widths) -> Tensor:
        rows = [self.layers[n].macs * w * a for n, (w, a) in widths.items() if a is not None]
        return torch.stack(rows).sum() if rows else torch.zeros(())

    def _weight_bits(self, widths: Widths) -> Tensor:
        return torch.stack([self.counts[n] * w for n, (w, _) in widths.items()]).sum()

    def _size(self, widths: Widths) -> Tensor:
        return self._weight_bits(widths) / 8 + self.beside

    def _inputs(self, widths: Widths) -> Tensor:
        rows = [self.layers[n].activation_count * a / 8 for n, (_, a) in widths.items() if a is not None]
        return torch.stack(rows) if rows else torch.zeros(1)

    def _activation_memory(self, widths: Widths) -> Tensor:
        return self._inputs(widths).sum()

    def _activation_peak(self, widths: Widths) -> Tensor:
        return self._inputs(widths).max()
