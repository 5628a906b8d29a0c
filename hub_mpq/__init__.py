"""Mixed-precision quantization for the Hugging Face Hub and timm."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hub.register import install

__version__ = "0.1.0"

# name -> module it is imported from on first use: `import hub_mpq` itself stays light
_LAZY = {
    "HubMPQ": "model",
    "Budget": "spec",
    "Candidates": "spec",
    "Indicators": "spec",
    "LayerBits": "spec",
    "LayerGraph": "spec",
    "Policy": "spec",
    "SearchResult": "spec",
    "solve_table": "solve",
    "HubMPQError": "errors",
    "MPQConfig": "hub.plugin",
}

__all__ = ["__version__", *sorted(_LAZY)]  # noqa: PLE0604

if TYPE_CHECKING:
    from .errors import HubMPQError as HubMPQError
    from .hub.plugin import MPQConfig as MPQConfig
    from .model import HubMPQ as HubMPQ
    from .solve import solve_table as solve_table
    from .spec import Budget as Budget
    from .spec import Candidates as Candidates
    from .spec import Indicators as Indicators
    from .spec import LayerBits as LayerBits
    from .spec import LayerGraph as LayerGraph
    from .spec import Policy as Policy
    from .spec import SearchResult as SearchResult


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


install()  # the one effect of importing: transformers knows "mpq", at once or when it is imported itself
