"""A model of three layers whose policies measure what a test says."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from hub_mpq.core import Budget, LayerBits, LayerGraph, LayerSpec
from hub_mpq.search.policy_search import search_policy
from hub_mpq.search.space import SearchSpace

WIDTHS = (2, 3, 4, 5, 6)


def graph_of(count=6):
    layers = [LayerSpec("stem", "conv2d", (4, 3, 3, 3), 1000, 108, 64, fixed=LayerBits(8, 8))]
    layers += [LayerSpec(f"body.{i}", "linear", (100, 5), 5000, 500, 50) for i in range(count)]
    return LayerGraph("toy", None, "module", (3, 8, 8), tuple(layers))


def parts_of(graph, sensitivity, inputs=None, widths=WIDTHS):
    """{layer: {widths: (weight's score, input's)}}: sensitivity · 4^−bits of each operand."""
    inputs = sensitivity if inputs is None else inputs
    return {
        x.name: {LayerBits(w, a): (s * 4.0**-w, t * 4.0**-a) for w in widths for a in widths}
        for x, s, t in zip(graph.searched, sensitivity, inputs, strict=True)
    }


def added(parts):
    return {name: {bits: w + a for bits, (w, a) in row.items()} for name, row in parts.items()}


def space_of(graph, parts, **limits):
    return SearchSpace(graph, added(parts), Budget(**limits), 0)


def optimum_of(space):
    return search_policy(space.graph, space.scores, space.budget, base_bytes=0)


class Meter:
    """Measures `truth(policy)` times 1 ± noise of the sample; a batch is a list of the samples' numbers.

    noise: of a sample and policy together, relative. shift: shift(policy, sample) is added.
    """

    def __init__(self, truth, noise=0.0, shift=None, spend=None):
        self.truth, self.noise, self.shift, self.spend = truth, noise, shift, spend
        self.forwards, self.seen = 0, []

    def items(self, batch):
        return len(batch), len(batch), False

    def measure_samples(self, policy, batches):
        samples = [i for batch in batches for i in batch]
        self.seen.append((policy, samples))
        self.forwards += len(batches)
        if self.spend is not None:
            self.spend(len(batches))
        value, key = self.truth(policy), zlib.crc32(str(policy.to_dict()).encode())
        rows = []
        for i in samples:
            factor = 1 + self.noise * np.random.default_rng([i, key]).normal()
            rows.append(value * factor + (self.shift(policy, i) if self.shift else 0.0))
        return torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows), dtype=torch.float64)


def truth_of(graph, parts):
    return lambda policy: sum(sum(parts[x.name][policy.bits[x.name]]) for x in graph.searched)


def batches_of(count=320, size=32):
    return [list(range(i, i + size)) for i in range(0, count, size)]
