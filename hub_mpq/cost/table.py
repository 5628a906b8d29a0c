"""Costs that a user brings as a table: measured milliseconds, energy, money."""

from __future__ import annotations

from collections.abc import Mapping

from ..core import Budget, LayerBits, LayerGraph, LayerSpec, Limit, Value, limits
from ..errors import InvalidArgument
from .latency import Latency


class CostTable(Limit):
    """The sum of a table's entries; layers that it does not name cost nothing.

    Args:
        name: What is limited.
        table: {layer: {"W4A4": cost}}.
        constant: What everything but the layers costs.
    """

    def __init__(self, name: str, table: Mapping[str, Mapping[str, float]], constant: float = 0) -> None:
        self.name = self.label = name
        self.table, self.constant = table, constant

    def amount(self, value: str | float) -> float:
        return float(value)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> float:
        row = self.table.get(layer.name)
        if row is None:
            return 0.0
        if str(bits) not in row:
            which = f"fixed layer {layer.name!r}" if layer.fixed is not None else f"layer {layer.name!r}"
            raise InvalidArgument(f"cost {self.name!r} of {which} has no entry for {bits}")
        return row[str(bits)]

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        return super().beside(graph, base_bytes) + self.constant

    def check(self, graph: LayerGraph) -> None:
        """InvalidArgument unless the table speaks of layers of the model only, and of fixed ones at their widths."""
        if unknown := sorted(set(self.table) - set(graph.names)):
            raise InvalidArgument(f"cost {self.name!r} speaks of layers that the model does not have: {unknown}")
        self.beside(graph, 0)


def all_limits(budget: Budget | None) -> list[Limit]:
    """Every registered limit, `latency` with the table of the budget, then the tables of costs."""
    table = None if budget is None else budget.latency_table
    own = [Latency(table) if type(limit) is Latency else limit for limit in limits]
    costs = {} if budget is None else budget.costs
    return [*own, *(CostTable(name, *rest) for name, (_, *rest) in costs.items())]


def limits_of(budget: Budget) -> list[tuple[Limit, Value]]:
    """The limits of a budget with their values, the registered ones first, then the tables."""
    known = {limit.name: limit for limit in all_limits(budget)}
    caps = {name: float(cap) for name, (cap, *_) in budget.costs.items()}
    return [(known[name], value) for name, value in {**budget.limits, **caps}.items()]
