"""BitOps: multiply-accumulates times weight bits times activation bits, per sample (LIMPQ §3.4)."""

from __future__ import annotations

from ..core import FLOAT_BITS, FloatOp, LayerBits, LayerGraph, LayerSpec, Policy


def layer_bitops(layer: LayerSpec, bits: LayerBits) -> int:
    """BitOps of one layer at these widths, exact. An embedding multiplies nothing: 0."""
    return layer.macs * bits.weight * bits.activation


def float_bitops(op: FloatOp) -> int:
    """BitOps of work that stays float: 32×32 a multiply-accumulate."""
    return op.macs * FLOAT_BITS * FLOAT_BITS


def bitops_breakdown(graph: LayerGraph, policy: Policy) -> dict[str, int]:
    """BitOps by part: searched and fixed layers, layers left float, products of two activations.

    Raises PolicyMismatch when the policy is for another graph. The parts add up to `graph_bitops`.
    """
    policy.check(graph)
    parts = {"searched": 0, "fixed": 0, "float": 0, "attention": 0}
    for layer in graph:
        parts["fixed" if layer.fixed else "searched"] += layer_bitops(layer, policy.bits[layer.name])
    for op in graph.floats:
        parts["attention" if op.kind in ("attention", "matmul") else "float"] += float_bitops(op)
    return parts


def graph_bitops(graph: LayerGraph, policy: Policy) -> int:
    """BitOps of the whole model for one sample, float work included."""
    return sum(bitops_breakdown(graph, policy).values())


def level_bitops(graph: LayerGraph, level: LayerBits | str) -> int:
    """BitOps of the whole model with every searched layer at one level; fixed layers keep their widths."""
    return graph_bitops(graph, Policy.uniform(graph, level))
