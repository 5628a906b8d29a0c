"""The results of a search: policies, their costs, and how they were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import InvalidArgument, PolicyMismatch, shown
from .bits import FLOAT_BITS, LayerBits
from .layer import LayerGraph


@dataclass(frozen=True)
class Policy:
    """The bit-widths of all quantized layers of a model, fixed ones included.

    Args:
        bits: {layer: bit-widths}.
        graph_digest: Digest of the model's layers, see `LayerGraph.digest`.

    Example:
        >>> from hub_mpq import Policy
        >>> from hub_mpq.adapters import load
        >>> policy = Policy.uniform(load("test_resnet", meta=True).graph, "W4A4")
        >>> str(policy.bits["layer1.0.conv1"]), str(policy.bits["fc"])
        ('W4A4', 'W8A8')
        >>> print(policy)  # doctest: +ELLIPSIS
        conv1.0                W8A8
        conv1.3                W4A4
        ...
    """

    bits: Mapping[str, LayerBits]
    graph_digest: str

    def __str__(self) -> str:
        names = [shown(name, 120) for name in self.bits]
        width = max(map(len, names), default=0)
        return "\n".join(f"{name:{width}}  {bits}" for name, bits in zip(names, self.bits.values(), strict=True))

    def check(self, graph: LayerGraph) -> None:
        """Check that the policy can be applied to a model.

        Args:
            graph: The model's layers.

        Raises:
            PolicyMismatch: The policy does not name exactly the model's layers.
            InvalidArgument: A layer does not support its bit-widths or group size, or layers that share a weight have
                different weight bit-widths.
        """
        names, mine = set(graph.names), set(self.bits)
        if names != mine or self.graph_digest != graph.digest:
            raise PolicyMismatch(names - mine, mine - names)
        for layer in graph:
            if self.bits[layer.name].grouped and not layer.takes_groups:
                raise InvalidArgument(
                    f"layer {layer.name!r} of kind {layer.kind!r} does not support group sizes or zero points"
                )
            owner = layer.weight_owner
            if (
                owner is not None
                and owner in self.bits
                and self.bits[layer.name].of_weight != self.bits[owner].of_weight
            ):
                raise InvalidArgument(
                    f"layers {layer.name!r} and {owner!r} share one weight: give both the same weight bits"
                )

    @classmethod
    def uniform(cls, graph: LayerGraph, bits: LayerBits | str) -> Policy:
        """Make a policy with one level for all searched layers.

        Args:
            graph: The model's layers.
            bits: The level, such as "W4A4".

        Returns:
            The policy. Fixed layers keep their bit-widths, and embeddings their float input.
        """
        level = LayerBits.parse(bits) if isinstance(bits, str) else bits
        return cls({layer.name: layer.fixed or layer.fitted(level) for layer in graph}, graph.digest)

    def with_groups(self, graph: LayerGraph, group_size: int | None, symmetric: bool = True) -> Policy:
        """Return the same policy with a group size and symmetry in searched layers that do not specify them.

        Args:
            graph: The model's layers.
            group_size: The group size, see `LayerBits`.
            symmetric: False for zero points.

        Returns:
            The new policy.
        """
        bits = dict(self.bits)
        for layer in graph.searched:
            if not bits[layer.name].grouped:
                bits[layer.name] = layer.fitted(bits[layer.name].with_groups(group_size, symmetric))
        return type(self)(bits, self.graph_digest)

    @property
    def weights_alone(self) -> bool:
        """Whether only weights are quantized: all inputs stay float."""
        return all(bits.activation == FLOAT_BITS for bits in self.bits.values())

    def to_dict(self) -> dict[str, Any]:
        """Convert the policy to JSON values.

        Returns:
            {"graph_digest": digest, "bits": {layer: "W4A4"}}.
        """
        return {"graph_digest": self.graph_digest, "bits": {k: str(self.bits[k]) for k in self.bits}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Rebuild a policy from the result of `to_dict`.

        Args:
            data: The JSON values.

        Returns:
            The policy.
        """
        return cls({name: LayerBits.parse(text) for name, text in data["bits"].items()}, data["graph_digest"])


@dataclass(frozen=True)
class Usage:
    """The cost of the whole model at a policy; indexing by the name of a limit returns an amount.

    Args:
        amounts: {limit: amount}, in the unit of each limit; for example counts of BitOps, bytes of sizes.

    Example:
        >>> from hub_mpq.core import Usage
        >>> usage = Usage({"bitops": 3.5e9, "size": 5.7e6})
        >>> usage["size"]
        5700000.0
        >>> print(usage)
        bitops 3.500 G  size 5.700 MB
    """

    amounts: Mapping[str, float]

    def __str__(self) -> str:
        from .limit import show_amount  # which imports this module

        return "  ".join(f"{shown(name, 120)} {show_amount(name, amount)}" for name, amount in self.amounts.items())

    def __getitem__(self, limit: str) -> float:
        return self.amounts[limit]


LEAST_SPEARMAN = 0.8
"""Minimum rank correlation of a good prediction with the measurements."""
SLOPES = (0.5, 2.0)
"""Range of measured over predicted of a good prediction in the unit of the measurement."""


@dataclass(frozen=True)
class Measurement:
    """A policy measured on held-out items that did not influence the choice.

    Args:
        name: "optimum", "uniform W3A3", "level W4A2", "greedy fill", "perturbed 7" or "refit".
        policy: The policy.
        predicted: Sum of its layers' scores; None if a layer has no score at its bit-widths.
        divergence: Mean over the items of the task's distance from the float model, see `Task.divergence`; infinite
            for outputs that are not finite.
        standard_error: Standard error of `divergence`; the items of one sample are treated as dependent.
        difference: Mean difference of the divergence from the optimum's, item by item; 0 for the optimum.
        difference_error: Standard error of `difference`.
        samples: Number of samples that were measured.
        items: Number of items (samples, tokens, pixels) in them.

    Example:
        >>> from hub_mpq import Policy
        >>> from hub_mpq.core import Measurement
        >>> Measurement("optimum", Policy({}, ""), 0.1, 0.12, 0.01, 0.0, 0.0, samples=64, items=64).divergence
        0.12
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
        """Convert the measurement to JSON values.

        Returns:
            {field: value}.
        """
        return {**asdict(self), "policy": self.policy.to_dict()}


@dataclass(frozen=True)
class PredictionCheck:
    """How well the scores predict the measured divergence of random policies within the budget.

    A prediction is good if Spearman's rank correlation is at least 0.8 and, for scores in the unit of the measurement,
    the slope is between 0.5 and 2.

    Args:
        spearman: Rank correlation of predicted and measured divergence over the policies.
        slope: Median over the policies of measured over predicted; None for scores that are not in a unit of
            divergence.
        policies: Number of policies.
        samples: Number of samples that each policy was measured on.
        items: Number of items (samples, tokens, pixels) in them.
        refitted: Whether scores refitted to the measurements predicted held-out policies better, so that their optimum
            was measured too.
        spearman_refit: Rank correlation of the refit, where each policy is predicted by a fit on others; None if no
            refit was tried.
        slope_refit: Slope of the refit; None if no refit was tried.
        seconds: Wall time of the check.
        forwards: Number of forward passes of a batch.

    Example:
        >>> from hub_mpq.core import PredictionCheck
        >>> check = PredictionCheck(spearman=0.93, slope=1.2, policies=20, samples=256, items=256)
        >>> print(check.good, check)
        True prediction over 20 random policies: Spearman 0.93, slope 1.20
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
        """Whether the rank correlation and the slope are within the bounds of a good prediction."""
        return self.spearman >= LEAST_SPEARMAN and (self.slope is None or SLOPES[0] <= self.slope <= SLOPES[1])

    def __str__(self) -> str:
        slope = "" if self.slope is None else f", slope {self.slope:.2f}"
        poor = "" if self.good else " (poor)"
        text = f"prediction over {self.policies} random policies: Spearman {self.spearman:.2f}{slope}{poor}"
        if self.spearman_refit is not None and self.slope_refit is not None:
            kept = "kept" if self.refitted else "not kept"
            figures = f"Spearman {self.spearman_refit:.2f}, slope {self.slope_refit:.2f}"
            text += f"; refit: {figures} on held-out policies, {kept}"
        return text


@dataclass(frozen=True)
class Validation:
    """How the policy of a search was chosen among measured policies.

    Args:
        done: Whether at least the optimum and the uniform policy were compared.
        verdict: The outcome in one sentence.
        data: Description of the data.
        choosing: Number of samples used for the choice.
        reporting: Number of other samples, used for the reported figures.
        seconds: Wall time, including the check of the prediction.
        forwards: Number of forward passes of a batch, of the float and of the quantized model.

    Example:
        >>> from hub_mpq.core import Validation
        >>> print(Validation(done=False, verdict="there are no batches"))
        not validated: there are no batches
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
            f" ({self.forwards:,} forward passes, {self.seconds:.1f} s)"
        )


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: the optimum of the scores with its proof, and the policy chosen by measuring.

    Args:
        policy: The policy to use.
        usage: Its cost.
        status: Status of the optimum: "optimal" (proved), or "feasible" (the time limit was reached).
        objective: Sum of scores of the optimum.
        bound: Bound on the sum of scores of any policy.
        gap: Distance between `objective` and `bound`.
        seconds: Time of the solver, including the construction of its table.
        strategy: Name of the strategy that made the scores.
        seed: Random seed of the scores.
        details: Further facts about the search, JSON values only.
        optimum: The policy with the best sum of scores; None if it is `policy`.
        chosen_by: Which of the measured policies `policy` is: "optimum", "uniform", "level W3A3", "greedy fill",
            "perturbed" or "refit".
        measurements: Policies measured on held-out items, the optimum first; empty if nothing was measured.
        check: How well the scores predict random policies; None if that was not measured.
        validation: How the policy was chosen; None if validation was not requested.

    Example:
        >>> from hub_mpq import HubMPQ, Indicators
        >>> from hub_mpq.adapters import load
        >>> mpq = HubMPQ(load("test_resnet", meta=True))  # or HubMPQ.from_pretrained("test_resnet")
        >>> scores = {layer.name: {2: 0.2, 4: 0.1} for layer in mpq.graph}
        >>> mpq.scores = Indicators(scores, scores)
        >>> result = mpq.search(bitops="W3A3", candidates=[2, 4])
        >>> result.status, result.chosen_by, result.optimum == result.policy
        ('optimal', 'optimum', True)
        >>> print(result)  # doctest: +ELLIPSIS
        conv1.0                W8A8
        ...
        fc                     W8A8
        bitops 1.0... G  size ... KB  compression ...
        optimal: objective 3.3, gap 0, ... s
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

    def __str__(self) -> str:
        return "\n".join(str(x) for x in (self.policy, self.usage, self.proof, self.validation, self.check) if x)

    @property
    def proof(self) -> str:
        """How good the optimum of the scores is, and which policy was chosen if it is another."""
        proof = proof_line(self)
        if self.policy == self.optimum:
            return proof
        return f"chosen by measuring: {self.chosen_by}; the optimum of the scores: {proof}"

    def to_dict(self) -> dict[str, Any]:
        """Convert the result to JSON values.

        Returns:
            {field: value}; numbers that are not finite become None.
        """
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {"policy": self.policy.to_dict(), "usage": dict(self.usage.amounts), "details": dict(self.details)}
        found["optimum"] = None if self.optimum is None else self.optimum.to_dict()
        found["measurements"] = [row.to_dict() for row in self.measurements]
        for name in ("check", "validation"):
            found[name] = None if found[name] is None else asdict(found[name])
        return _json(found)  # type: ignore[no-any-return]


def proof_line(found: Any) -> str:
    """Status, objective, gap and seconds of a `SearchResult` or a `Solution`."""
    return f"{found.status}: objective {found.objective:.10g}, gap {found.gap:.3g}, {found.seconds:.3f} s"


def _json(tree: Any) -> Any:
    """JSON values, with None for numbers that are not finite."""
    if isinstance(tree, Mapping):
        return {key: _json(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_json(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
