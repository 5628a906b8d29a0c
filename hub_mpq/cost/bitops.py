"""BitOps: multiply-accumulates times weight bits times activation bits, per sample (LIMPQ §3.4)."""

from __future__ import annotations

from ..core import FLOAT_BITS, FloatOp, LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_count


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


class BitOps(Limit):
    """BitOps of the whole model for one sample; work that stays float counts 32×32 bits."""

    name, label = "bitops", "BitOps of the whole model"
    help = 'BitOps of one sample: a level ("W4A4") or the whole model ("34.7G").'
    whole_numbers = True
    level_parts = ("weight", "activation")

    def amount(self, value: str | float) -> float:
        return parse_count(value, self.name)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return layer_bitops(layer, bits)

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        return super().beside(graph, base_bytes) + sum(map(float_bitops, graph.floats))

    def reduction(self, graph: LayerGraph) -> Reduction:
        return Reduction({x.name: x.macs for x in graph.searched})
