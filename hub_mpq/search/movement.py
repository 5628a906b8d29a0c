"""Did the scales learn anything? How far they went, and whether their ranking changed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scales = Mapping[str, Mapping[int, float]]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho; 1.0 when there is nothing to rank."""
    x, y = _ranks(a), _ranks(b)
    if x.std() == 0 or y.std() == 0:
        return 1.0
    return float(np.corrcoef(x, y)[0, 1])


def movement(start: Scales, end: Scales) -> dict[str, float]:
    """Median and largest relative change of the scales, and their rank correlation with the start over the layers of
    one width (mean over widths). An indicator that equals its initialisation is not learned."""
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
