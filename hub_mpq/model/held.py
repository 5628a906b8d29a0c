"""What a HubMPQ holds, and what a policy costs it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .._version import __version__
from ..adapters.base import Source
from ..core import FLOAT_BITS, Candidates, Indicators, LayerBits, LayerGraph, Policy, SearchResult, Usage
from ..cost.size import layer_nbytes
from ..errors import HubMPQError
from ..export import COMPRESSED_TENSORS, exportable
from ..nn.packing import predicted_nbytes
from ..pack import Manifest
from ..report import report
from ..search.candidates import CandidatesLike, resolve_candidates
from ..search.policy_search import usage_of
from ..search.train_scores import StrategyScores

Pins = Mapping[str, LayerBits | str | None]


def _brief(told: Any) -> Any:
    """What a strategy tells of itself without its tables of layers, which would outgrow the header's reserve, and
    without seconds: two runs of one seed give the same file."""
    if not isinstance(told, Mapping):
        return told
    return {k: v for k, v in told.items() if not isinstance(v, (Mapping, list)) and not k.endswith("seconds")}


class Held(nn.Module):
    """The model, its graph, and what is known of it so far."""

    def __init__(
        self, source: Source, *, fixed: Pins | None = None, weight_only: bool = False, tie_fused: bool = False
    ) -> None:
        super().__init__()
        self.model = source.model
        self.source = source
        self.weight_only = weight_only
        self.graph: LayerGraph = source.graph
        self._pin(fixed or {})
        if tie_fused:
            self.graph = self.graph.with_tied_inputs()
        self.policy: Policy | None = None
        self.indicators: Indicators | None = None
        self.learned: StrategyScores | None = None
        self.result: SearchResult | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.made: dict[str, Any] = {}  # how the quantized model came to be: search, fine-tuning
        self.home: Path | None = None  # the folder it was loaded from
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
        text = report(self.graph, self.policy, usage, self.metrics, self.seconds)
        if self.policy is not None and exportable(self._manifest(self.policy)):
            text += (
                "\nweights alone are quantized, in Linear and Embedding layers: "
                f'push_to_hub(…, format="{COMPRESSED_TENSORS}") '
                "publishes it so that transformers needs no hub-mpq"
            )
        return text

    def base_bytes(self) -> int:
        """Bytes of the packed file beside the searched layers, the same at every policy."""
        policy = Policy.uniform(self.graph, "W2A2")
        model = self._float[0] if self._float else self.model
        searched = sum(layer_nbytes(layer, policy.bits[layer.name]) for layer in self.graph.searched)
        return predicted_nbytes(model, self._manifest(policy)) - searched

    def _manifest(self, policy: Policy) -> Manifest:
        provenance: dict[str, Any] = {"hub_mpq": __version__, "metrics": self.metrics, **self.made}
        if self.result is not None:
            details = self.result
            provenance["search"] = {
                "strategy": details.strategy,
                "status": details.status,
                "objective": details.objective,
                "gap": details.gap,
                "seed": details.seed,
                **{key: _brief(value) for key, value in details.details.items()},
            }
        source = self.source
        # a local folder's path is nobody's business: its name says as much
        base = Path(source.model_id).name if Path(source.model_id).is_dir() else source.model_id
        graph = replace(self.graph, model_id=base)
        return Manifest(base, source.revision, source.library, graph, policy, provenance)

    def _pin(self, fixed: Pins | None) -> None:
        if fixed:
            self.graph = self.graph.with_fixed(fixed)
        if self.weight_only:
            pinned = {x.name: x.fixed for x in self.graph if x.fixed is not None}
            self.graph = self.graph.with_fixed(
                {glob.escape(n): LayerBits(bits.weight, FLOAT_BITS) for n, bits in pinned.items()}
            )

    def _candidates(self, value: CandidatesLike) -> dict[str, Candidates]:
        """Candidates of every searched layer, of weights alone where only weights are searched."""
        found = resolve_candidates(self.graph, value)
        if not self.weight_only:
            return found
        return {name: Candidates(c.weight, (FLOAT_BITS,)) for name, c in found.items()}
