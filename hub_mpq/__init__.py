"""Mixed-precision quantization for the Hugging Face Hub and timm."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .hub.register import install

# name -> module it is imported from on first use: `import hub_mpq` itself stays light
_LAZY = {
    "HubMPQ": "model",
    "Budget": "core",
    "Candidates": "core",
    "Indicators": "core",
    "LayerBits": "core",
    "LayerGraph": "core",
    "Policy": "core",
    "SearchResult": "core",
    "solve_table": "solve",
    "HubMPQError": "errors",
    "MPQConfig": "hub.plugin",
}

__all__ = ["__version__", *sorted(_LAZY)]  # noqa: PLE0604

if TYPE_CHECKING:
    from .core import Budget as Budget
    from .core import Candidates as Candidates
    from .core import Indicators as Indicators
    from .core import LayerBits as LayerBits
    from .core import LayerGraph as LayerGraph
    from .core import Policy as Policy
    from .core import SearchResult as SearchResult
    from .errors import HubMPQError as HubMPQError
    from .hub.plugin import MPQConfig as MPQConfig
    from .model import HubMPQ as HubMPQ
    from .solve import solve_table as solve_table


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


install()  # the one effect of importing: transformers knows "mpq", at once or when it is imported itself
