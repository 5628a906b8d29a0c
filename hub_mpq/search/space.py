"""What a search chooses from: the scores and the policies that a budget allows."""

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
"""Of one solve beside the optimum's; what is best by then is taken."""


@dataclass(frozen=True)
class SearchSpace:
    """The policies of a budget, and what their scores are.

    Args:
        graph: The layers of the model.
        scores: {searched layer: {widths: score}}.
        budget: The limits.
        base_bytes: Bytes of the packed file beside the searched layers.
        sense: "min" when a smaller score is better.
    """

    graph: LayerGraph
    scores: Scores
    budget: Budget
    base_bytes: int
    sense: str = "min"

    def solve(self, scores: Scores, sense: str | None = None) -> Policy | None:
        """The best policy within the budget for other scores; None where none is found in `SOLVE_SECONDS`."""
        problem = build(self.graph, scores, self.budget, base_bytes=self.base_bytes, sense=sense or self.sense)
        try:
            _, bits = problem.solve(SOLVE_SECONDS)
        except HubMPQError:
            return None
        return self.policy(bits)

    def policy(self, bits: dict[str, LayerBits]) -> Policy:
        """The policy of these widths of the searched layers; the fixed ones keep theirs."""
        return Policy({x.name: x.fixed or bits[x.name] for x in self.graph}, self.graph.digest)

    def predicted(self, policy: Policy) -> float | None:
        """The sum of the layers' scores; None where a layer has none at its widths."""
        rows = [self.scores[x.name].get(policy.bits[x.name]) for x in self.graph.searched]
        return None if None in rows else float(sum(rows))  # type: ignore[arg-type]

    def fill(self, policy: Policy) -> float | None:
        """The greatest part of any limit that a policy takes, of what is left to the searched layers; None where it
        passes one. 1 is a full budget."""
        parsed, graph, parts = limits_of(self.budget), self.graph, [0.0]
        if any(limit.one_input for limit, _ in parsed):
            graph = graph.with_one_width_per_input()
        fixed, searched = fixed_of(graph), [(x, policy.bits[x.name]) for x in graph.searched]
        for limit, value in parsed:
            cap = limit.cap(graph, value, self.base_bytes)
            each = [[pair] for pair in searched] if limit.over == "max" else [searched]
            try:
                used = max(limit.together(pairs, fixed) for pairs in each)
            except InvalidArgument:  # a table of costs without these widths
                return None
            if over({limit.name: used}, {limit.name: cap}):
                return None
            parts.append(used / cap if cap else 1.0)
        return max(parts)

    def levels(self, candidates: dict[str, Candidates]) -> list[LayerBits]:
        """Levels that all searched layers can take and that meet every limit, the dearest first.

        Of levels that fill the budget alike, the one of more bits, then of nearer widths, then of wider inputs.
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
                continue  # of group sizes, or a pair, that not all layers can choose
            part = self.fill(policy)
            if part is not None:
                found.append((round(part, 9), level.weight * level.activation, level))
        found.sort(key=lambda row: (row[0], row[1], -abs(row[2].weight - row[2].activation), row[2].activation, row[2]))
        return [level for _, _, level in reversed(found)]

    def greedy_fill(self) -> Policy | None:
        """The policy that raises the narrowest widths first until a limit is full, as the solver makes it: every bit
        more in an operand is worth a quarter of the one before, in all layers alike."""
        return self.solve(_power_of_noise(self.scores, {}), "min")

    def perturbed(self, rng: np.random.Generator, sigma: float, scores: Scores | None = None) -> Policy | None:
        """The optimum of scores that are off by factors: their logarithms have deviation `sigma`, and a third each of
        the variance is the layer's, its weight width's and its input width's [our construction]."""
        step = sigma / np.sqrt(3)
        out = {}
        for name, row in (scores or self.scores).items():
            weights = {b: rng.normal(0, step) for b in sorted({bits.weight for bits in row})}
            inputs = {b: rng.normal(0, step) for b in sorted({bits.activation for bits in row})}
            layer = rng.normal(0, step)
            out[name] = {b: s * float(np.exp(layer + weights[b.weight] + inputs[b.activation])) for b, s in row.items()}
        return self.solve(out)

    def random(self, rng: np.random.Generator) -> Policy | None:
        """A policy that owes nothing to the scores: the greedy fill with a random worth of the operands of each layer,
        lognormal of deviation 1 [our construction]."""
        worth = {name: (float(np.exp(rng.normal())), float(np.exp(rng.normal()))) for name in self.scores}
        return self.solve(_power_of_noise(self.scores, worth), "min")


def _choices(layer: LayerSpec, candidates: Candidates) -> tuple[LayerBits, ...]:
    return candidates.weights if layer.weight_only else candidates.pairs


def _power_of_noise(scores: Scores, worth: dict[str, tuple[float, float]]) -> Scores:
    """4^−b of each operand, times its worth: what the power of uniform rounding noise is proportional to."""
    out = {}
    for name, row in scores.items():
        weight, activation = worth.get(name, (1.0, 1.0))
        out[name] = {
            bits: weight * 4.0**-bits.weight + (activation * 4.0**-bits.activation if bits.activation < 32 else 0.0)
            for bits in row
        }
    return out
