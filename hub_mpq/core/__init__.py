"""The words of the package, as frozen dataclasses. Standard library only."""

from .bits import FLOAT_BITS, Candidates, LayerBits, check_width
from .budget import Budget, parse_bytes, parse_count, parse_ratio
from .indicators import Indicators
from .layer import FloatOp, LayerGraph, LayerSpec
from .result import Policy, SearchResult, Usage
from .tensor import QuantSpec

__all__ = [
    "FLOAT_BITS",
    "Budget",
    "Candidates",
    "FloatOp",
    "Indicators",
    "LayerBits",
    "LayerGraph",
    "LayerSpec",
    "Policy",
    "QuantSpec",
    "SearchResult",
    "Usage",
    "check_width",
    "parse_bytes",
    "parse_count",
    "parse_ratio",
]
