"""The costs of a policy: one `Limit` per quantity. Exact arithmetic on `LayerSpec` objects, without torch."""

from ..core import register_limit
from .activations import ActivationMemory, ActivationPeak, activation_memory, activation_nbytes, activation_peak
from .bitops import BitOps, bitops_breakdown, float_bitops, graph_bitops, layer_bitops, level_bitops
from .latency import Latency
from .size import Size
from .table import CostTable, all_limits, limits_of
from .weights import Compression, WeightBits, mean_weight_bits, weight_bits

for _limit in (BitOps, Size, Compression, WeightBits, ActivationMemory, ActivationPeak, Latency):
    register_limit(_limit)

__all__ = [
    "CostTable",
    "activation_memory",
    "activation_nbytes",
    "activation_peak",
    "all_limits",
    "bitops_breakdown",
    "float_bitops",
    "graph_bitops",
    "layer_bitops",
    "level_bitops",
    "limits_of",
    "mean_weight_bits",
    "weight_bits",
]
