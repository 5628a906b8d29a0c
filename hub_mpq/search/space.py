"""The search space: scores, and the policies that a budget allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import FLOAT_BITS, Budget, Candidates, LayerBits, LayerGraph, LayerSpec, Policy
from ..core.limit import fixed_of
from ..cost import limits_of
from ..errors import HubMPQError, InvalidArgument
from ..solve.exact import over
from .problem import build
from .scores import Scores

SOLVE_SECONDS = 2.0
"""Time limit of each solve apart from that of the optimum; the best solution by then is used."""


@dataclass(frozen=True)
class SearchSpace:
    """The policies within a budget, and their scores.

    Args:
        graph: The layers of the model.
        scores: `{searched layer: {bit-widths: score}}`.
        budget: The limits.
        base_bytes: Bytes of the packed file apart from the searched layers.
        sense: "min" if smaller scores are better, else "max".
    """

    graph: LayerGraph
    scores: Scores
    budget: Budget
    base_bytes: int
    sense: str = "min"

    def solve(self, scores: Scores, sense: str | None = None) -> Policy | None:
        """Return the best policy within the budget for other scores; None if none is found in `SOLVE_SECONDS`."""
        problem = build(self.graph, scores, self.budget, base_bytes=self.base_bytes, sense=sense or self.sense)
        try:
            _, bits = problem.solve(SOLVE_SECONDS)
        except HubMPQError:
            return None
        return self.policy(bits)

    def policy(self, bits: dict[str, LayerBits]) -> Policy:
        """Return the policy with these bit-widths in the searched layers; fixed layers keep theirs."""
        return Policy({x.name: x.fixed or bits[x.name] for x in self.graph}, self.graph.digest)

    def predicted(self, policy: Policy) -> float | None:
        """Return the sum of the scores of the layers; None if a layer has no score at its bit-widths."""
        rows = [self.scores[x.name].get(policy.bits[x.name]) for x in self.graph.searched]
        return None if None in rows else float(sum(rows))  # type: ignore[arg-type]

    def fill(self, policy: Policy) -> float | None:
        """Return the largest fraction of any limit that the searched layers use, of what fixed layers leave of it.

        A full budget is 1; None if a limit is exceeded.
        """
        parsed, graph, parts = limits_of(self.budget), self.graph, [0.0]
        if any(limit.one_input for limit, _ in parsed):
            graph = graph.with_one_width_per_input()
        fixed, searched = fixed_of(graph), [(x, policy.bits[x.name]) for x in graph.searched]
        for limit, value in parsed:
            cap = limit.cap(graph, value, self.base_bytes)
            each = [[pair] for pair in searched] if limit.over == "max" else [searched]
            try:
                used = max(limit.together(pairs, fixed) for pairs in each)
            except InvalidArgument:  # a table of costs does not have these bit-widths
                return None
            if over({limit.name: used}, {limit.name: cap}):
                return None
            parts.append(used / cap if cap else 1.0)
        return max(parts)

    def levels(self, candidates: dict[str, Candidates]) -> list[LayerBits]:
        """Return the levels that are candidates of all searched layers and meet every limit, the most costly first.

        Levels that fill the budget equally are ordered by more bits, then by closer bit-widths of weights and inputs,
        then by wider inputs.
        """
        names = [x.name for x in self.graph.searched]
        inputs = [candidates[x.name].activation for x in self.graph.searched if not x.weight_only]
        weights = set(candidates[names[0]].weight).intersection(*(candidates[name].weight for name in names))
        activations = set(inputs[0]).intersection(*inputs) if inputs else {FLOAT_BITS}
        groups = {grid for c in candidates.values() for grid in c.grids}
        plain = [LayerBits(w, a) for w in weights for a in activations]
        found = []
        for level in dict.fromkeys(bits.with_groups(*group) for bits in plain for group in groups):
            policy = Policy.uniform(self.graph, level)
            if any(policy.bits[x.name] not in _choices(x, candidates[x.name]) for x in self.graph.searched):
                continue  # not all layers can have this group size or pair
            part = self.fill(policy)
            if part is not None:
                found.append((round(part, 9), level.weight * level.activation, level))
        found.sort(key=lambda row: (row[0], row[1], -abs(row[2].weight - row[2].activation), row[2].activation, row[2]))
        return [level for _, _, level in reversed(found)]

    def greedy_fill(self) -> Policy | None:
        """Return the policy that raises the narrowest bit-widths first until a limit is full, found by the solver.

        Each additional bit of an operand is worth a quarter of the previous one, equally in all layers.
        """
        return self.solve(_power_of_noise(self.scores, {}), "min")

    def perturbed(self, rng: np.random.Generator, sigma: float, scores: Scores | None = None) -> Policy | None:
        """Return the optimum of scores that are perturbed by random factors.

        The logarithms of the factors have the standard deviation `sigma`. A third of the variance each comes from the
        layer, its weight bits and its input bits; this is our construction.
        """
        step = sigma / np.sqrt(3)
        out = {}
        for name, row in (scores or self.scores).items():
            weights = {b: rng.normal(0, step) for b in sorted({bits.weight for bits in row})}
            inputs = {b: rng.normal(0, step) for b in sorted({bits.activation for bits in row})}
            layer = rng.normal(0, step)
            out[name] = {b: s * float(np.exp(layer + weights[b.weight] + inputs[b.activation])) for b, s in row.items()}
        return self.solve(out)

    def random(self, rng: np.random.Generator) -> Policy | None:
        """Return a random policy that is independent of the scores.

        It is the greedy fill with random weights of the operands of each layer, lognormal with deviation 1; this is our
        construction.
        """
        worth = {name: (float(np.exp(rng.normal())), float(np.exp(rng.normal()))) for name in self.scores}
        return self.solve(_power_of_noise(self.scores, worth), "min")


def _choices(layer: LayerSpec, candidates: Candidates) -> tuple[LayerBits, ...]:
    return candidates.weights if layer.weight_only else candidates.pairs


def _power_of_noise(scores: Scores, worth: dict[str, tuple[float, float]]) -> Scores:
    """Return 4^−b of each operand times its weight, which the power of uniform rounding noise is proportional to."""
    out = {}
    for name, row in scores.items():
        weight, activation = worth.get(name, (1.0, 1.0))
        out[name] = {
            bits: weight * 4.0**-bits.weight + (activation * 4.0**-bits.activation if bits.activation < 32 else 0.0)
            for bits in row
        }
    return out
