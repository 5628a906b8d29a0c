"""Whether the scales were learned: how far they moved, and whether their ranking changed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scales = Mapping[str, Mapping[int, float]]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Compute ranks; ties have their average."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Spearman's rank correlation; 1.0 if all values of an argument are equal."""
    x, y = _ranks(a), _ranks(b)
    if x.std() == 0 or y.std() == 0:
        return 1.0
    return float(np.corrcoef(x, y)[0, 1])


def movement(start: Scales, end: Scales) -> dict[str, float]:
    """Compute how far scales have moved; an indicator that equals its initial value has not been learned.

    Returns:
        The median and largest relative change of the scales, and their rank correlation with the initial values over
        the layers at one bit-width, averaged over the bit-widths.
    """
    names = sorted(end)
    if not names:
        return {}
    change = [abs(end[n][b] / start[n][b] - 1) for n in names for b in end[n]]
    widths = sorted({b for n in names for b in end[n]})
    rho = []
    for b in widths:
        pairs = np.array([(start[n][b], end[n][b]) for n in names if b in end[n]])
        rho.append(rank_correlation(pairs[:, 0], pairs[:, 1]))
    return {
        "median_change": float(np.median(change)),
        "largest_change": float(np.max(change)),
        "rank_correlation": float(np.mean(rho)),
    }
