"""Bytes of quantized inputs, all of one sample together and the largest of them."""

from __future__ import annotations

from ..core import LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_bytes


def activation_nbytes(layer: LayerSpec, bits: LayerBits) -> int:
    """Bytes of the layer's quantized input for one sample, rounded up; 0 for a layer that reads indices."""
    return 0 if layer.weight_only else -(-layer.activation_count * bits.activation // 8)


def activation_memory(graph: LayerGraph, policy: Policy) -> int:
    """Bytes of all quantized inputs of one sample together."""
    policy.check(graph)
    return sum(activation_nbytes(layer, policy.bits[layer.name]) for layer in graph)


def activation_peak(graph: LayerGraph, policy: Policy) -> int:
    """Bytes of the largest quantized input of one sample."""
    policy.check(graph)
    return max((activation_nbytes(layer, policy.bits[layer.name]) for layer in graph), default=0)


class ActivationMemory(Limit):
    """Bytes of all quantized inputs of one sample together."""

    name, unit, label = "activation_memory", "B", "quantized activations of one sample"
    help = 'Bytes of all quantized inputs of a sample ("200KB") or a level ("A4").'
    whole_numbers = True
    level_parts = ("activation",)

    def amount(self, value: str | float) -> float:
        return parse_bytes(value, self.name)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return activation_nbytes(layer, bits)

    def reduction(self, graph: LayerGraph) -> Reduction:
        counts = {x.name: x.activation_count / 8 for x in graph.searched}
        return Reduction(counts, weight=False, over=self.over)


class ActivationPeak(ActivationMemory):
    """Bytes of the largest quantized input of one sample."""

    name, label = "activation_peak", "largest quantized activation of one sample"
    help = 'Bytes of the largest quantized input ("50KB") or a level ("A4").'
    over = "max"
