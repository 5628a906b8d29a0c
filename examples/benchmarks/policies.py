"""Baseline policies: random ones at the same budget, and reversed scores."""

from __future__ import annotations

import numpy as np

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.search.scores import Scores


def random_policy(mpq: HubMPQ, limit: str, target: float, generator: np.random.Generator) -> Policy:
    """Draw random bit-widths, then make single random changes until the limit lies within 1 % below `target`."""
    graph = mpq.graph
    widths = {
        x.name: (
            sorted(mpq.scores.weight[x.name]),
            [32] if x.weight_only else sorted(mpq.scores.activation[x.name]),
        )
        for x in graph.searched
    }
    fixed = {x.name: x.fixed for x in graph if x.fixed is not None}
    names = sorted(widths)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(graph[name].activation_tie or name, []).append(name)

    def amount(bits: dict[str, LayerBits]) -> float:
        return mpq.usage(Policy({**fixed, **bits}, graph.digest))[limit]

    def changed(bits: dict[str, LayerBits]) -> dict[str, LayerBits]:
        group = groups[generator.choice(sorted(groups))]
        out = dict(bits)
        if generator.random() < 0.5:
            name = str(generator.choice(group))
            out[name] = LayerBits(int(generator.choice(widths[name][0])), out[name].activation)
        else:
            width = int(generator.choice(widths[group[0]][1]))
            for name in group:
                out[name] = LayerBits(out[name].weight, width)
        return out

    bits = {n: LayerBits(int(generator.choice(widths[n][0])), int(generator.choice(widths[n][1]))) for n in names}
    for group in groups.values():
        for name in group:
            bits[name] = LayerBits(bits[name].weight, bits[group[0]].activation)
    now = amount(bits)
    for trials in range(20000):
        if 0.99 * target <= now <= target:
            return Policy({**fixed, **bits}, graph.digest)
        trial = changed(bits)
        value = amount(trial)
        # sometimes step away: a small network has few policies, and the nearest may be a dead end
        if abs(value - 0.995 * target) < abs(now - 0.995 * target) or trials % 50 == 49:
            bits, now = trial, value
    raise SystemExit(f"no random policy found within 1 % below {limit} = {target:.4g}")


def reversed_scores(scores: Scores) -> Scores:
    """Exchange the score tables of the layers of rank i and rank n − 1 − i, ranked by mean score.

    A bit-width that one of the two lacks (an outlier of the training) is omitted.
    """
    ranked = sorted(scores, key=lambda name: float(np.mean(list(scores[name].values()))))
    out = {}
    for name, other in zip(ranked, reversed(ranked), strict=True):
        table = {bits: scores[other][bits] for bits in scores[name] if bits in scores[other]}
        out[name] = table or dict(scores[name])
    return out
