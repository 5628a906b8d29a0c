"""BitOps per sample: multiply-accumulates × weight bits × activation bits, as in the paper (LIMPQ, §3.4)."""

from __future__ import annotations

from ..core import FLOAT_BITS, FloatOp, LayerBits, LayerGraph, LayerSpec, Limit, Policy, Reduction, parse_count


def layer_bitops(layer: LayerSpec, bits: LayerBits) -> int:
    """Compute the BitOps of one layer for one sample.

    Args:
        layer: The layer.
        bits: Its bit-widths.

    Returns:
        MACs × weight bits × activation bits; 0 for an embedding, which does no multiplications.

    References:
        LIMPQ (Tang et al., ECCV 2022), §3.4.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import LayerBits
        >>> from hub_mpq.cost import layer_bitops
        >>> layer_bitops(load("test_resnet", meta=True).graph["fc"], LayerBits(4, 4))
        1536000
    """
    return layer.macs * bits.weight * bits.activation


def float_bitops(op: FloatOp) -> int:
    """Compute the BitOps of work that stays float, at 32×32 bits per multiply-accumulate.

    Args:
        op: The work.

    Returns:
        The BitOps for one sample.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.cost import float_bitops
        >>> graph = load("test_resnet", meta=True, exclude=["fc"]).graph
        >>> [float_bitops(op) for op in graph.floats]
        [98304000]
    """
    return op.macs * FLOAT_BITS * FLOAT_BITS


def bitops_breakdown(graph: LayerGraph, policy: Policy) -> dict[str, int]:
    """Compute the BitOps of each part of a model for one sample.

    Args:
        graph: The model's layers.
        policy: The policy.

    Returns:
        {"searched", "fixed", "float" (layers that stay float), "attention" (products of two activations): BitOps};
        they add up to `graph_bitops`.

    Raises:
        PolicyMismatch: The policy is for another model.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import Policy
        >>> from hub_mpq.cost import bitops_breakdown
        >>> graph = load("test_resnet", meta=True).graph
        >>> bitops_breakdown(graph, Policy.uniform(graph, "W4A4"))
        {'searched': 1594982400, 'fixed': 183091200, 'float': 0, 'attention': 0}
    """
    policy.check(graph)
    parts = {"searched": 0, "fixed": 0, "float": 0, "attention": 0}
    for layer in graph:
        parts["fixed" if layer.fixed else "searched"] += layer_bitops(layer, policy.bits[layer.name])
    for op in graph.floats:
        parts["attention" if op.kind in ("attention", "matmul") else "float"] += float_bitops(op)
    return parts


def graph_bitops(graph: LayerGraph, policy: Policy) -> int:
    """Compute the BitOps of the whole model for one sample, including float work.

    Args:
        graph: The model's layers.
        policy: The policy.

    Returns:
        The BitOps.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import Policy, human
        >>> from hub_mpq.cost import graph_bitops
        >>> graph = load("test_resnet", meta=True).graph
        >>> human(graph_bitops(graph, Policy.uniform(graph, "W4A4")))
        '1.778 G'
    """
    return sum(bitops_breakdown(graph, policy).values())


def level_bitops(graph: LayerGraph, level: LayerBits | str) -> int:
    """Compute the BitOps of the whole model with all searched layers at one level.

    Args:
        graph: The model's layers.
        level: The level, such as "W4A4"; fixed layers keep their bit-widths.

    Returns:
        The BitOps for one sample.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import human
        >>> from hub_mpq.cost import level_bitops
        >>> human(level_bitops(load("test_resnet", meta=True).graph, "W8A8"))
        '6.563 G'
    """
    return graph_bitops(graph, Policy.uniform(graph, level))


class BitOps(Limit):
    """BitOps of the whole model for one sample; float work counts at 32×32 bits."""

    name, label = "bitops", "BitOps of the whole model"
    help = 'Maximum BitOps of the whole model for one sample ("34.7G"), or a level ("W4A4").'
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
