"""Bytes of the quantized inputs of one sample: their total, and the largest one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..core import LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_bytes
from ..core.limit import LayerAt


def activation_nbytes(layer: LayerSpec, bits: LayerBits) -> int:
    """Compute the bytes of a layer's quantized input for one sample.

    Args:
        layer: The layer.
        bits: Its bit-widths.

    Returns:
        The bytes, rounded up; 0 for a layer without a quantized input.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import LayerBits
        >>> from hub_mpq.cost import activation_nbytes
        >>> activation_nbytes(load("test_resnet", meta=True).graph["fc"], LayerBits(8, 4))
        48
    """
    return 0 if layer.weight_only else -(-layer.activation_count * bits.activation // 8)


def activation_memory(graph: LayerGraph, policy: Policy) -> int:
    """Compute the total bytes of all quantized inputs of one sample.

    A tensor that several layers read counts once for each bit-width at which it is read.

    Args:
        graph: The model's layers.
        policy: The policy.

    Returns:
        The bytes.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import Policy
        >>> from hub_mpq.cost import activation_memory
        >>> graph = load("test_resnet", meta=True).graph
        >>> activation_memory(graph, Policy.uniform(graph, "W4A4"))
        309296
    """
    policy.check(graph)
    return sum(_buffers((layer, policy.bits[layer.name]) for layer in graph).values())


def activation_peak(graph: LayerGraph, policy: Policy) -> int:
    """Compute the bytes of the largest quantized input of one sample.

    Args:
        graph: The model's layers.
        policy: The policy.

    Returns:
        The bytes.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import Policy
        >>> from hub_mpq.cost import activation_peak
        >>> graph = load("test_resnet", meta=True).graph
        >>> activation_peak(graph, Policy.uniform(graph, "W4A4"))
        76800
    """
    policy.check(graph)
    return max((activation_nbytes(layer, policy.bits[layer.name]) for layer in graph), default=0)


def _buffers(layers: Iterable[LayerAt]) -> dict[tuple[str, int], int]:
    """{(first reader of a tensor, bit-width): bytes}."""
    out: dict[tuple[str, int], int] = {}
    for layer, bits in layers:
        at = layer.buffer, bits.activation
        out[at] = max(out.get(at, 0), activation_nbytes(layer, bits))
    return out


class _Activations(Limit):
    """Common base of the limits on inputs: the cost of a layer is the bytes of its quantized input."""

    unit = "B"
    whole_numbers = True
    level_parts = ("activation",)

    def amount(self, value: str | float) -> float:
        return parse_bytes(value, self.name)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return activation_nbytes(layer, bits)


class ActivationMemory(_Activations):
    """Total bytes of all quantized inputs of one sample.

    A tensor that several layers read is stored once per bit-width at which it is read. A search under this limit gives
    all its readers one bit-width, so that the solver's sum is exact.
    """

    name, label = "activation_memory", "quantized activations of one sample"
    help = 'Maximum bytes of all quantized inputs of one sample ("200KB"), or a level ("A4").'
    one_input = True

    def together(self, layers: Sequence[LayerAt], beside: Sequence[LayerAt] = ()) -> int:
        there = _buffers(beside)
        return sum(nbytes for at, nbytes in _buffers(layers).items() if at not in there)

    def reduction(self, graph: LayerGraph) -> Reduction:
        readers = Counter(x.buffer for x in graph.searched if not x.weight_only)
        counts = {x.name: x.activation_count / 8 / (readers[x.buffer] or 1) for x in graph.searched}
        return Reduction(counts, weight=False)


class ActivationPeak(_Activations):
    """Bytes of the largest quantized input of one sample."""

    name, label = "activation_peak", "largest quantized activation of one sample"
    help = 'Maximum bytes of the largest quantized input of one sample ("50KB"), or a level ("A4").'
    over = "max"

    def reduction(self, graph: LayerGraph) -> Reduction:
        counts = {x.name: x.activation_count / 8 for x in graph.searched}
        return Reduction(counts, weight=False, over="max")
