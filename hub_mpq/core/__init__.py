"""The vocabulary of the package: frozen dataclasses, interfaces and extensible registries. Standard library only."""

from .bits import FLOAT_BITS, Candidates, LayerBits, check_width
from .budget import Budget
from .indicators import Indicators
from .latency import LatencyTable, read_latency_table
from .layer import FloatOp, LayerGraph, LayerSpec, matching
from .layer_kind import LayerKind, layer_kinds, register_layer_kind
from .library import Library, libraries, register_library
from .limit import Limit, Reduction, Value, limits, register_limit
from .options import Engine, FinetuneOptions, IndicatorOptions
from .result import Measurement, Policy, PredictionCheck, SearchResult, Usage, Validation
from .runtime import Runtime, RuntimeLayers, register_runtime, runtimes
from .target import Target, register_target, targets
from .task import register_task, tasks
from .tensor import QuantSpec
from .units import human, human_seconds, parse_bytes, parse_count, parse_ratio, parse_seconds

__all__ = [
    "FLOAT_BITS",
    "Budget",
    "Candidates",
    "Engine",
    "FinetuneOptions",
    "FloatOp",
    "IndicatorOptions",
    "Indicators",
    "LatencyTable",
    "LayerBits",
    "LayerGraph",
    "LayerKind",
    "LayerSpec",
    "Library",
    "Limit",
    "Measurement",
    "Policy",
    "PredictionCheck",
    "QuantSpec",
    "Reduction",
    "Runtime",
    "RuntimeLayers",
    "SearchResult",
    "Target",
    "Usage",
    "Validation",
    "Value",
    "check_width",
    "human",
    "human_seconds",
    "layer_kinds",
    "libraries",
    "limits",
    "matching",
    "parse_bytes",
    "parse_count",
    "parse_ratio",
    "parse_seconds",
    "read_latency_table",
    "register_layer_kind",
    "register_library",
    "register_limit",
    "register_runtime",
    "register_target",
    "register_task",
    "runtimes",
    "targets",
    "tasks",
]
