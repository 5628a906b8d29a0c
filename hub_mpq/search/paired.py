"""Means over items and paired differences of them, with standard errors that know which items one sample has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]
"""(sum of the divergences of each sample's items, how many of them count)."""


def mean_of(sums: Sums) -> tuple[float, float]:
    """(mean over items, its standard error with the items of a sample as dependent); infinite for a broken policy."""
    return _clustered(*sums)


def difference_of(sums: Sums, other: Sums) -> tuple[float, float]:
    """(mean over items of a policy's divergence less another's, its standard error), paired sample by sample."""
    if not torch.isfinite(other[0]).all():
        return (-math.inf, 0.0) if torch.isfinite(sums[0]).all() else (0.0, math.inf)
    return _clustered(sums[0] - other[0], sums[1])


def _clustered(values: Tensor, counts: Tensor) -> tuple[float, float]:
    if not torch.isfinite(values).all():
        return math.inf, 0.0
    items, samples = float(counts.sum()), int((counts > 0).sum())
    if samples < 2:
        return float(values.sum()) / max(items, 1.0), math.inf
    mean = float(values.sum()) / items
    spread = float((values - mean * counts).square().sum()) * samples / (samples - 1)
    return mean, math.sqrt(spread) / items
