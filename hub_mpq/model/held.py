"""What a HubMPQ holds, and what a policy costs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..adapters.base import Source
from ..cost.size import layer_nbytes
from ..errors import HubMPQError
from ..hub.folder import predicted_nbytes
from ..pack import Manifest
from ..report import report
from ..search.policy_search import usage_of
from ..search.train_scores import StrategyScores
from ..spec import Indicators, LayerBits, LayerGraph, Policy, SearchResult, Usage

Pins = Mapping[str, LayerBits | str | None]


class Held(nn.Module):
    """The model, its graph, and what is known of it so far."""

    def __init__(self, source: Source, *, fixed: Pins | None = None) -> None:
        super().__init__()
        self.model = source.model
        self.source = source
        self.graph: LayerGraph = source.graph.with_fixed(fixed or {})
        self.policy: Policy | None = None
        self.indicators: Indicators | None = None
        self.learned: StrategyScores | None = None
        self.result: SearchResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        # in a tuple: the float model is no submodule, or every state dict would hold it too
        self._float: tuple[nn.Module, ...] = (source.model,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's own forward."""
        return self.model(*args, **kwargs)

    @property
    def float_model(self) -> nn.Module:
        """The model before quantization. Raises HubMPQError for one loaded from packed weights: it has none."""
        if not self._float:
            raise HubMPQError(
                "this model was loaded from packed weights and has no float weights to start from; "
                f"load its base model {self.graph.model_id!r} to quantize anew"
            )
        return self._float[0]

    def usage(self, policy: Policy | LayerBits | str | None = None) -> Usage:
        """Whole-model cost of a policy (default: the one applied)."""
        policy = policy or self.policy
        if policy is None:
            raise HubMPQError("there is no policy yet")
        if not isinstance(policy, Policy):
            policy = Policy.uniform(self.graph, policy)
        return usage_of(self.graph, policy, None, self.base_bytes())

    def report(self) -> str:
        """Widths, BitOps and bytes per layer and in all, accuracy before and after, seconds of each stage."""
        usage = self.usage() if self.policy is not None else None
        return report(self.graph, self.policy, usage, self.metrics, self.seconds)

    def base_bytes(self) -> int:
        """Bytes of the packed file beside the searched layers, the same at every policy."""
        policy = Policy.uniform(self.graph, "W2A2")
        model = self._float[0] if self._float else self.model
        searched = sum(layer_nbytes(layer, policy.bits[layer.name]) for layer in self.graph.searched)
        return predicted_nbytes(model, self._manifest(policy)) - searched

    def _manifest(self, policy: Policy) -> Manifest:
        provenance: dict[str, Any] = {"hub_mpq": __version__, "metrics": self.metrics}
        if self.result is not None:
            details = self.result
            provenance["search"] = {
                "strategy": details.strategy,
                "status": details.status,
                "objective": details.objective,
                "gap": details.gap,
                "seed": details.seed,
                **details.details,
            }
        source = self.source
        # a local folder's path is nobody's business: its name says as much
        base = Path(source.model_id).name if Path(source.model_id).is_dir() else source.model_id
        graph = replace(self.graph, model_id=base)
        return Manifest(base, source.revision, source.library, graph, policy, provenance)

    def _pin(self, fixed: Pins | None) -> None:
        if fixed:
            self.graph = self.graph.with_fixed(fixed)
