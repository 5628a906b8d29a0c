"""The words of the package, as frozen dataclasses. Standard library only."""

from .bits import FLOAT_BITS, Candidates, LayerBits, check_width
from .budget import Budget, parse_bytes, parse_count, parse_ratio
from .indicators import Indicators
from .layer import FloatOp, LayerGraph, LayerSpec
from .layer_kind import LayerKind, layer_kinds, register_layer_kind
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
    "LayerKind",
    "LayerSpec",
    "Policy",
    "QuantSpec",
    "SearchResult",
    "Usage",
    "check_width",
    "layer_kinds",
    "parse_bytes",
    "parse_count",
    "parse_ratio",
    "register_layer_kind",
]
