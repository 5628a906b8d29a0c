"""What a search answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import InvalidArgument, PolicyMismatch
from .bits import FLOAT_BITS, LayerBits
from .layer import LayerGraph


@dataclass(frozen=True)
class Policy:
    """Widths of every quantized layer (fixed ones included), for the graph with this digest."""

    bits: Mapping[str, LayerBits]
    graph_digest: str

    def check(self, graph: LayerGraph) -> None:
        """Raise PolicyMismatch unless the policy speaks of exactly this graph's layers, InvalidArgument for a width or
        groups that a layer can't take."""
        names, mine = set(graph.names), set(self.bits)
        if names != mine or self.graph_digest != graph.digest:
            raise PolicyMismatch(names - mine, mine - names)
        for layer in graph:
            if self.bits[layer.name].grouped and not layer.takes_groups:
                raise InvalidArgument(
                    f"layer {layer.name!r} is a {layer.kind}: its weight has no groups and no zero points"
                )
            owner = layer.weight_owner
            if (
                owner is not None
                and owner in self.bits
                and self.bits[layer.name].of_weight != self.bits[owner].of_weight
            ):
                raise InvalidArgument(
                    f"layers {layer.name!r} and {owner!r} share one weight: give both the same width of weights"
                )

    @classmethod
    def uniform(cls, graph: LayerGraph, bits: LayerBits | str) -> Policy:
        """One level for every searched layer; fixed layers keep theirs, embeddings a float input."""
        level = LayerBits.parse(bits) if isinstance(bits, str) else bits
        return cls({layer.name: layer.fixed or layer.fitted(level) for layer in graph}, graph.digest)

    def with_groups(self, graph: LayerGraph, group_size: int | None, symmetric: bool = True) -> Policy:
        """The same widths, with groups and zero points in the searched layers that name neither.

        Args:
            graph: The layers.
            group_size, symmetric: As in `LayerBits`.
        """
        bits = dict(self.bits)
        for layer in graph.searched:
            if not bits[layer.name].grouped:
                bits[layer.name] = layer.fitted(bits[layer.name].with_groups(group_size, symmetric))
        return type(self)(bits, self.graph_digest)

    @property
    def weights_alone(self) -> bool:
        """Whether all inputs stay float."""
        return all(bits.activation == FLOAT_BITS for bits in self.bits.values())

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


LEAST_SPEARMAN = 0.8
"""A prediction whose rank correlation with measurements is lower is poor."""
SLOPES = (0.5, 2.0)
"""A prediction in the measurement's own unit is poor where measured over predicted lies outside these."""


@dataclass(frozen=True)
class Measurement:
    """One policy, measured on held-out items that chose nothing.

    Args:
        name: "optimum", "uniform W3A3", "level W4A2", "greedy fill", "perturbed 7" or "refit".
        policy: Its widths.
        predicted: Sum of the scores of its layers; None where a layer has no score at its widths.
        divergence: Mean over the items of the task's distance from the float model, see `Task.divergence`; infinite
            for outputs that are not finite.
        standard_error: Of that mean; the items of one sample count as dependent.
        difference: Its divergence less the optimum's, item by item; 0 for the optimum.
        difference_error: Standard error of that mean difference.
        samples: How many samples it was measured on.
        items: How many items (samples, tokens, pixels) of theirs count.
    """

    name: str
    policy: Policy
    predicted: float | None
    divergence: float
    standard_error: float
    difference: float
    difference_error: float
    samples: int
    items: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "policy": self.policy.to_dict()}


@dataclass(frozen=True)
class PredictionCheck:
    """What scores predict of random policies within the budget, laid beside what these measure.

    A prediction is good where Spearman's rank correlation is at least 0.8 (`LEAST_SPEARMAN`) and, for scores in the
    unit of the measurement, the slope is from 0.5 to 2 (`SLOPES`).

    Args:
        spearman: Rank correlation of predicted and measured divergence over the policies.
        slope: Median over the policies of measured over predicted; None for scores that have no unit of divergence.
        policies: How many there were.
        samples, items: What each was measured on.
        refitted: Whether scores that were refitted to the measurements predicted held-out policies better, so that
            their optimum was measured too.
        spearman_refit, slope_refit: Of the refit, each policy predicted by a fit on others; None where none was tried.
        seconds, forwards: What the check took: wall time, forward passes of a batch.
    """

    spearman: float
    slope: float | None
    policies: int
    samples: int
    items: int
    refitted: bool = False
    spearman_refit: float | None = None
    slope_refit: float | None = None
    seconds: float = 0.0
    forwards: int = 0

    @property
    def good(self) -> bool:
        """Whether both figures are within the stated bounds."""
        return self.spearman >= LEAST_SPEARMAN and (self.slope is None or SLOPES[0] <= self.slope <= SLOPES[1])

    def __str__(self) -> str:
        slope = "" if self.slope is None else f", slope {self.slope:.2f}"
        poor = "" if self.good else " (poor)"
        text = f"prediction over {self.policies} random policies: Spearman {self.spearman:.2f}{slope}{poor}"
        if self.spearman_refit is not None and self.slope_refit is not None:
            kept = "kept" if self.refitted else "not kept"
            text += f"; refitted: {self.spearman_refit:.2f}, slope {self.slope_refit:.2f} on held-out policies, {kept}"
        return text


@dataclass(frozen=True)
class Validation:
    """How a search's policy was chosen among measured ones.

    Args:
        done: Whether at least the optimum and uniform were compared.
        verdict: What came out, in one sentence.
        data: What was measured on.
        choosing: Samples that the choice was made on.
        reporting: Other samples, that the reported figures are of.
        seconds: Wall time, the check of the prediction included.
        forwards: Forward passes of a batch, of the float and of the quantized model.
    """

    done: bool
    verdict: str
    data: str = ""
    choosing: int = 0
    reporting: int = 0
    seconds: float = 0.0
    forwards: int = 0

    def __str__(self) -> str:
        if not self.done:
            return f"not validated: {self.verdict}"
        return (
            f"{self.verdict}; chosen on {self.choosing:,} samples of {self.data}, measured on {self.reporting:,} others"
            f" with {self.forwards:,} forward passes in {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class SearchResult:
    """The best policy for the scores with the proof that goes with it, and the policy that was chosen by measuring.

    Args:
        policy: The policy to use.
        usage: What it costs.
        status: Of the optimum: "optimal" (proved), or "feasible" (a time limit struck).
        objective, bound, gap: Of the optimum: its sum of scores, what no policy's can be better than, their distance.
        seconds: Of the solver, building its table included.
        strategy: What made the scores.
        seed: Of the scores.
        details: What else there is to say of the search, JSON values only.
        optimum: The policy of the best sum of scores; None stands for `policy`.
        chosen_by: Which measured policy `policy` is: "optimum", "uniform", "level W3A3", "greedy fill", "perturbed" or
            "refit".
        measurements: Policies on held-out items, the optimum first; empty where nothing was measured.
        check: What the scores predict of random policies; None where that was not measured.
        validation: How the policy was chosen; None where that was not asked for.
    """

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
    optimum: Policy | None = None
    chosen_by: str = "optimum"
    measurements: tuple[Measurement, ...] = ()
    check: PredictionCheck | None = None
    validation: Validation | None = None

    def __post_init__(self) -> None:
        if self.optimum is None:
            object.__setattr__(self, "optimum", self.policy)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite is None."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {"policy": self.policy.to_dict(), "usage": dict(self.usage.amounts), "details": dict(self.details)}
        found["optimum"] = None if self.optimum is None else self.optimum.to_dict()
        found["measurements"] = [row.to_dict() for row in self.measurements]
        for name in ("check", "validation"):
            found[name] = None if found[name] is None else asdict(found[name])
        return _json(found)  # type: ignore[no-any-return]


def _json(tree: Any) -> Any:
    """JSON values, in which what is not finite is null."""
    if isinstance(tree, Mapping):
        return {key: _json(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_json(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
