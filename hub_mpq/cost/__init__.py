"""What a policy costs: plain arithmetic on LayerSpecs, exact integers, no torch."""

from .bitops import bitops_breakdown, float_bitops, graph_bitops, layer_bitops, level_bitops
from .memory import activation_memory, activation_nbytes, activation_peak, mean_weight_bits, weight_bits

__all__ = [
    "activation_memory",
    "activation_nbytes",
    "activation_peak",
    "bitops_breakdown",
    "float_bitops",
    "graph_bitops",
    "layer_bitops",
    "level_bitops",
    "mean_weight_bits",
    "weight_bits",
]
