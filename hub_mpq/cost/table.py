"""Custom costs given as a table, such as measured milliseconds or energy."""

from __future__ import annotations

from collections.abc import Mapping

from ..core import Budget, LayerBits, LayerGraph, LayerSpec, Limit, Value, limits
from ..errors import InvalidArgument
from .latency import Latency


class CostTable(Limit):
    """A limit on the sum of a table's entries; layers that it does not list cost nothing.

    Args:
        name: Name of the cost.
        table: {layer: {"W4A4": cost}}.
        constant: Cost of everything but the layers.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import LayerBits
        >>> from hub_mpq.cost import CostTable
        >>> graph = load("test_resnet", meta=True).graph
        >>> CostTable("ms", {"fc": {"W8A8": 0.2}}).of_layer(graph["fc"], LayerBits(8, 8))
        0.2
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
            raise InvalidArgument(f"cost {self.name!r} has no entry for {which} at {bits}")
        return row[str(bits)]

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        return super().beside(graph, base_bytes) + self.constant

    def check(self, graph: LayerGraph) -> None:
        """Check that the table fits a model.

        Args:
            graph: The model's layers.

        Raises:
            InvalidArgument: The table lists layers that the model does not have, or lacks the bit-widths of a fixed
                layer that it lists.
        """
        if unknown := sorted(set(self.table) - set(graph.names)):
            raise InvalidArgument(f"cost {self.name!r} lists layers that the model does not have: {unknown}")
        self.beside(graph, 0)


def all_limits(budget: Budget | None) -> list[Limit]:
    """Return all limits that apply to a budget.

    Args:
        budget: The budget, or None.

    Returns:
        All registered limits (`latency` with the budget's table), then the budget's custom costs.

    Example:
        >>> from hub_mpq.cost import all_limits
        >>> [limit.name for limit in all_limits(None)][:3]
        ['bitops', 'size', 'compression']
    """
    table = None if budget is None else budget.latency_table
    own = [Latency(table) if type(limit) is Latency else limit for limit in limits]
    costs = {} if budget is None else budget.costs
    return [*own, *(CostTable(name, *rest) for name, (_, *rest) in costs.items())]


def limits_of(budget: Budget) -> list[tuple[Limit, Value]]:
    """Return the limits of a budget with their values.

    Args:
        budget: The budget.

    Returns:
        (limit, value) of the registered limits, then of the custom costs.

    Example:
        >>> from hub_mpq import Budget
        >>> from hub_mpq.cost import limits_of
        >>> [(limit.name, str(value)) for limit, value in limits_of(Budget(bitops="W4A4", size="5.7MB"))]
        [('bitops', 'W4A4'), ('size', '5700000.0')]
    """
    known = {limit.name: limit for limit in all_limits(budget)}
    caps = {name: float(cap) for name, (cap, *_) in budget.costs.items()}
    return [(known[name], value) for name, value in {**budget.limits, **caps}.items()]
