"""Mixed-precision quantization of timm and Hugging Face models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .hub.register import install

# name -> module that it is imported from on first use, so that `import hub_mpq` stays light
_LAZY = {
    "HubMPQ": "model",
    **dict.fromkeys(
        ["Budget", "Candidates", "Indicators", "LayerBits", "LayerGraph", "Policy", "SearchResult"], "core"
    ),
    **dict.fromkeys(["Engine", "FinetuneOptions", "IndicatorOptions"], "core"),
    **dict.fromkeys(["Limit", "register_limit"], "core"),
    **dict.fromkeys(["LayerKind", "register_layer_kind"], "core"),
    **dict.fromkeys(["Library", "register_library"], "core"),
    "Task": "tasks",
    "register_task": "core",
    **dict.fromkeys(["Runtime", "register_runtime"], "core"),
    **dict.fromkeys(["Target", "register_target"], "core"),
    **dict.fromkeys(["LatencyTable", "read_latency_table"], "core"),
    "write_latency_table": "pack",
    **dict.fromkeys(["SearchStrategy", "register_strategy"], "search.strategy"),
    "solve_table": "solve",
    "HubMPQError": "errors",
    "MPQConfig": "hub.plugin",
    "set_resident": "nn.packed",
    "to_runtime": "runtime",
}

__all__ = ["__version__", *sorted(_LAZY)]  # noqa: PLE0604

if TYPE_CHECKING:
    from .core import Budget as Budget
    from .core import Candidates as Candidates
    from .core import Engine as Engine
    from .core import FinetuneOptions as FinetuneOptions
    from .core import IndicatorOptions as IndicatorOptions
    from .core import Indicators as Indicators
    from .core import LatencyTable as LatencyTable
    from .core import LayerBits as LayerBits
    from .core import LayerGraph as LayerGraph
    from .core import LayerKind as LayerKind
    from .core import Library as Library
    from .core import Limit as Limit
    from .core import Policy as Policy
    from .core import Runtime as Runtime
    from .core import SearchResult as SearchResult
    from .core import Target as Target
    from .core import read_latency_table as read_latency_table
    from .core import register_layer_kind as register_layer_kind
    from .core import register_library as register_library
    from .core import register_limit as register_limit
    from .core import register_runtime as register_runtime
    from .core import register_target as register_target
    from .core import register_task as register_task
    from .errors import HubMPQError as HubMPQError
    from .hub.plugin import MPQConfig as MPQConfig
    from .model import HubMPQ as HubMPQ
    from .nn.packed import set_resident as set_resident
    from .pack import write_latency_table as write_latency_table
    from .runtime import to_runtime as to_runtime
    from .search.strategy import SearchStrategy as SearchStrategy
    from .search.strategy import register_strategy as register_strategy
    from .solve import solve_table as solve_table
    from .tasks import Task as Task


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


install()  # the only side effect of importing: registers "mpq" with transformers, now or once that is imported
