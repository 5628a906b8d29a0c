"""What a search answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import PolicyMismatch
from .bits import LayerBits
from .layer import LayerGraph


@dataclass(frozen=True)
class Policy:
    """Widths of every quantized layer (fixed ones included), for the graph with this digest."""

    bits: Mapping[str, LayerBits]
    graph_digest: str

    def check(self, graph: LayerGraph) -> None:
        """Raise PolicyMismatch unless the policy speaks of exactly this graph's layers."""
        names, mine = set(graph.names), set(self.bits)
        if names != mine or self.graph_digest != graph.digest:
            raise PolicyMismatch(names - mine, mine - names)

    @classmethod
    def uniform(cls, graph: LayerGraph, bits: LayerBits | str) -> Policy:
        """One level for every searched layer; fixed layers keep theirs, embeddings a float input."""
        level = LayerBits.parse(bits) if isinstance(bits, str) else bits
        return cls(
            {
                layer.name: layer.fixed or (LayerBits(level.weight, 32) if layer.weight_only else level)
                for layer in graph
            },
            graph.digest,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"graph_digest": self.graph_digest, "bits": {k: str(self.bits[k]) for k in self.bits}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        return cls({name: LayerBits.parse(text) for name, text in data["bits"].items()}, data["graph_digest"])


@dataclass(frozen=True)
class Usage:
    """What a policy costs, whole model: {limit name: amount}. BitOps are counts, sizes are bytes."""

    amounts: Mapping[str, float]

    def __getitem__(self, limit: str) -> float:
        return self.amounts[limit]


@dataclass(frozen=True)
class SearchResult:
    """A policy and the proof that goes with it. `status`: optimal | feasible (a time limit struck)."""

    policy: Policy
    usage: Usage
    status: str
    objective: float
    bound: float
    gap: float
    seconds: float
    strategy: str
    seed: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "policy": self.policy.to_dict(), "usage": dict(self.usage.amounts)}
