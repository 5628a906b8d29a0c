"""Bits of weights: their mean, and how much smaller than float32 they are. Bytes of the packed file are in `size`."""

from __future__ import annotations

from ..core import LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_ratio
from ..errors import InvalidArgument


def weight_bits(layer: LayerSpec, bits: LayerBits) -> int:
    """Bits of the layer's weight alone, no scales; 0 when another layer owns the Parameter, so each counts once."""
    return owned_weights(layer) * bits.weight


def owned_weights(layer: LayerSpec) -> int:
    """Weights of a layer that no other layer owns."""
    return 0 if layer.weight_owner else layer.weight_count


def mean_weight_bits(graph: LayerGraph, policy: Policy) -> float:
    """Mean bits of the searched layers' weights, each weight counted once."""
    policy.check(graph)
    found = WeightBits().of_policy(graph, policy, 0)
    if found is None:
        raise InvalidArgument("mean weight bits: no layer is searched")
    return found


class _Weights(Limit):
    """What both limits on weights share: the cost of a layer is the bits of its weight."""

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return weight_bits(layer, bits)

    def reduction(self, graph: LayerGraph) -> Reduction:
        return Reduction({x.name: owned_weights(x) for x in graph.searched}, activation=False)


class WeightBits(_Weights):
    """Mean bits of the searched layers' weights, each weight counted once."""

    name, label = "weight_bits", "mean bits of the searched weights"
    help = "Mean bits of the searched weights."

    def amount(self, value: str | float) -> float:
        bits = parse_ratio(value, self.name)
        if not bits > 0:
            raise InvalidArgument(f"weight_bits: {value!r} must be above zero")
        return bits

    def cap(self, graph: LayerGraph, value: float | LayerBits, base_bytes: int) -> float:
        return float(value) * self._count(graph)  # type: ignore[arg-type]

    def whole(self, graph: LayerGraph, searched: float, base_bytes: int) -> float | None:
        count = self._count(graph)
        return searched / count if count else None

    def show(self, amount: float) -> str:
        return f"{amount:.3f}"

    def _count(self, graph: LayerGraph) -> int:
        return sum(map(owned_weights, graph.searched))


class Compression(_Weights):
    """Float32 bytes of all quantized layers' weights over their packed bits (LIMPQ's ratio)."""

    name, label, unit = "compression", "compression of the quantized weights", "x"
    help = 'Float bytes over packed bytes of the quantized weights, at least ("12.2").'
    at_least = True

    def amount(self, value: str | float) -> float:
        ratio = parse_ratio(value)
        if not ratio >= 1:
            raise InvalidArgument(f"compression: {value!r} must be at least 1")
        return ratio

    def cap(self, graph: LayerGraph, value: float | LayerBits, base_bytes: int) -> float:
        return self._float_bits(graph) / float(value) - self.beside(graph, base_bytes)  # type: ignore[arg-type]

    def whole(self, graph: LayerGraph, searched: float, base_bytes: int) -> float | None:
        return self._float_bits(graph) / max(searched + self.beside(graph, base_bytes), 1)

    def show(self, amount: float) -> str:
        return f"{amount:.2f}x"

    def _float_bits(self, graph: LayerGraph) -> int:
        return 32 * sum(map(owned_weights, graph))
