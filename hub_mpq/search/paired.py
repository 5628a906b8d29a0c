"""Means over items and their paired differences, with standard errors clustered by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]
"""(sum of the divergences of each sample's items, number of items that count)."""


def mean_of(sums: Sums) -> tuple[float, float]:
    """Return the mean over items and its standard error; infinite if a divergence is not finite.

    Items of one sample are treated as dependent.
    """
    return _clustered(*sums)


def difference_of(sums: Sums, other: Sums) -> tuple[float, float]:
    """Return the mean over items of a policy's divergence minus another's and its standard error, paired by sample."""
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
