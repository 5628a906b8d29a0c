"""Bits of weights and bytes of quantized inputs. Bytes of the packed file are in `size`."""

from __future__ import annotations

from ..core import LayerBits, LayerGraph, LayerSpec, Policy
from ..errors import InvalidArgument


def weight_bits(layer: LayerSpec, bits: LayerBits) -> int:
    """Bits of the layer's weight alone, no scales; 0 when another layer owns the Parameter, so each counts once."""
    return 0 if layer.weight_owner else layer.weight_count * bits.weight


def mean_weight_bits(graph: LayerGraph, policy: Policy) -> float:
    """Mean bits of the searched layers' weights, each weight counted once."""
    policy.check(graph)
    owned = [layer for layer in graph.searched if not layer.weight_owner]
    count = sum(layer.weight_count for layer in owned)
    if not count:
        raise InvalidArgument("mean weight bits: no layer is searched")
    return sum(weight_bits(layer, policy.bits[layer.name]) for layer in owned) / count


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
