"""Bits of weights: their mean, and the compression over float32. The bytes of the packed file are in `size`."""

from __future__ import annotations

from ..core import LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_ratio
from ..errors import InvalidArgument


def weight_bits(layer: LayerSpec, bits: LayerBits) -> int:
    """Compute the bits of a layer's weight, without scales.

    Args:
        layer: The layer.
        bits: Its bit-widths.

    Returns:
        The bits; 0 if the layer shares another layer's weight, so that each weight counts once.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import LayerBits
        >>> from hub_mpq.cost import weight_bits
        >>> weight_bits(load("test_resnet", meta=True).graph["fc"], LayerBits(4, 4))
        384000
    """
    return owned_weights(layer) * bits.weight


def owned_weights(layer: LayerSpec) -> int:
    """The number of a layer's weights; 0 if it shares another layer's weight."""
    return 0 if layer.weight_owner else layer.weight_count


def mean_weight_bits(graph: LayerGraph, policy: Policy) -> float:
    """Compute the mean bit-width of the searched layers' weights, each weight counted once.

    Args:
        graph: The model's layers.
        policy: The policy.

    Returns:
        The mean in bits.

    Raises:
        InvalidArgument: No layer is searched.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import Policy
        >>> from hub_mpq.cost import mean_weight_bits
        >>> graph = load("test_resnet", meta=True).graph
        >>> mean_weight_bits(graph, Policy.uniform(graph, "W4A4"))
        4.0
    """
    policy.check(graph)
    found = WeightBits().of_policy(graph, policy, 0)
    if found is None:
        raise InvalidArgument("cannot compute mean weight bits: no layer is searched")
    return found


class _Weights(Limit):
    """Common base of the limits on weights: the cost of a layer is the bits of its weight."""

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return weight_bits(layer, bits)

    def reduction(self, graph: LayerGraph) -> Reduction:
        return Reduction({x.name: owned_weights(x) for x in graph.searched}, activation=False)


class WeightBits(_Weights):
    """Mean bit-width of the searched layers' weights, each weight counted once."""

    name, label = "weight_bits", "mean bits of the searched weights"
    help = "Maximum mean bit-width of the searched weights."

    def amount(self, value: str | float) -> float:
        bits = parse_ratio(value, self.name)
        if not bits > 0:
            raise InvalidArgument(f"weight_bits must be positive, got {value!r}")
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
    """Ratio of the float32 size of all quantized layers' weights to their packed size, as in the LIMPQ paper."""

    name, label, unit = "compression", "compression of the quantized weights", "x"
    help = 'Minimum ratio of float32 to packed size of the quantized weights ("12.2").'
    at_least = True

    def amount(self, value: str | float) -> float:
        ratio = parse_ratio(value)
        if not ratio >= 1:
            raise InvalidArgument(f"compression must be at least 1, got {value!r}")
        return ratio

    def cap(self, graph: LayerGraph, value: float | LayerBits, base_bytes: int) -> float:
        return self._float_bits(graph) / float(value) - self.beside(graph, base_bytes)  # type: ignore[arg-type]

    def whole(self, graph: LayerGraph, searched: float, base_bytes: int) -> float | None:
        return self._float_bits(graph) / max(searched + self.beside(graph, base_bytes), 1)

    def show(self, amount: float) -> str:
        return f"{amount:.2f}x"

    def _float_bits(self, graph: LayerGraph) -> int:
        return 32 * sum(map(owned_weights, graph))
