"""The words of the package, as frozen dataclasses, and the registries that others add to. Standard library only."""

from .bits import FLOAT_BITS, Candidates, LayerBits, check_width
from .budget import Budget
from .indicators import Indicators
from .layer import FloatOp, LayerGraph, LayerSpec
from .limit import Limit, Reduction, Value, limits, register_limit
from .options import Engine, FinetuneOptions, IndicatorOptions
from .result import Policy, SearchResult, Usage
from .tensor import QuantSpec
from .units import human, parse_bytes, parse_count, parse_ratio

__all__ = [
    "FLOAT_BITS",
    "Budget",
    "Candidates",
    "Engine",
    "FinetuneOptions",
    "FloatOp",
    "IndicatorOptions",
    "Indicators",
    "LayerBits",
    "LayerGraph",
    "LayerSpec",
    "Limit",
    "Policy",
    "QuantSpec",
    "Reduction",
    "SearchResult",
    "Usage",
    "Value",
    "check_width",
    "human",
    "limits",
    "parse_bytes",
    "parse_count",
    "parse_ratio",
    "register_limit",
]
