"""Seconds of one call, from a measured table."""

from __future__ import annotations

from ..core import LatencyTable, LayerBits, LayerGraph, LayerSpec, Limit, Policy, human_seconds, parse_seconds
from ..core.budget import NO_TABLE
from ..errors import InvalidArgument


class Latency(Limit):
    """Seconds of one call of the whole model, from a table of `HubMPQ.measure_latency`.

    Args:
        table: The table of the budget; without one the limit cannot be evaluated.
    """

    name, unit, label = "latency", "s", "latency of one call"
    help = 'Maximum time of one call ("5ms") at the runtime, batch size and threads of --latency-table.'

    def __init__(self, table: LatencyTable | None = None) -> None:
        self.table = table

    def amount(self, value: str | float) -> float:
        return parse_seconds(value, self.name)

    def _known(self) -> LatencyTable:
        if self.table is None:
            raise InvalidArgument(NO_TABLE)
        return self.table

    def check(self, graph: LayerGraph) -> None:
        self._known().check(graph)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> float:
        return self._known().seconds(layer.name, bits)

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        return super().beside(graph, base_bytes) + self._known().constant

    def of_policy(self, graph: LayerGraph, policy: Policy, base_bytes: int) -> float | None:
        return None if self.table is None else super().of_policy(graph, policy, base_bytes)

    def show(self, amount: float) -> str:
        return human_seconds(amount)
