"""Check over random policies whether sums of scores predict measurements, and refit the scores to them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import LayerBits, LayerSpec, Policy, PredictionCheck
from ..core.indicators import DIVERGENCES
from .measure import PolicyMeter
from .movement import rank_correlation
from .scores import Scores
from .space import SearchSpace

POLICIES = 20
"""Number of random policies that a check measures."""
LEAST_POLICIES = 9
"""Minimum number of different policies for a check."""
SAMPLES, TOKENS = 128, 512
"""Maximum number of samples, or tokens, that each policy is measured on."""
SIGMAS = (0.35, 0.8)
"""Minimum and maximum standard deviation of the logarithm of perturbed scores."""
SPREAD = 0.5
"""Expected deviation of the factors of a refit from their common factor."""
FOLDS = 3

Parts = Mapping[str, Mapping[LayerBits, tuple[float, float]]]
"""`{layer: {bit-widths: (score of the weight, score of the input)}}`; the two add up to the score of the layer."""
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """A check with its measurements.

    Args:
        check: The result of the check.
        policies: The policies that were measured.
        perturbed: Whether each of them is an optimum of perturbed scores; the others are independent of the scores.
        measured: Divergence of each policy.
        refit: Scores refitted to the measurements, in their unit; None if they do not predict better.
    """

    check: PredictionCheck
    policies: tuple[Policy, ...]
    perturbed: tuple[bool, ...]
    measured: tuple[float, ...]
    refit: Scores | None


def random_policies(space: SearchSpace, count: int, seed: int) -> list[tuple[Policy, bool]]:
    """Draw different random policies that fill a budget.

    They alternate between the greedy fill with random weights of the layers, and the optimum of scores perturbed by
    0.35 to 0.8.

    Args:
        space: The budget and the scores.
        count: Maximum number of policies; there are fewer if the budget allows fewer.
        seed: Seed of the draws.

    Returns:
        `[(policy, whether it depends on the scores)]`.
    """
    rng = np.random.default_rng([seed, 1])
    found: dict[tuple[LayerBits, ...], tuple[Policy, bool]] = {}
    for i in range(2 * count):
        if len(found) == count:
            break
        of_scores = i % 2 == 1
        policy = space.perturbed(rng, float(rng.uniform(*SIGMAS))) if of_scores else space.random(rng)
        if policy is not None:
            found.setdefault(tuple(policy.bits.values()), (policy, of_scores))
    return list(found.values())


def check_prediction(
    space: SearchSpace,
    meter: PolicyMeter,
    batches: Sequence[Any],
    *,
    unit: str,
    parts: Parts,
    seed: int = 0,
    policies: int = POLICIES,
    refit: bool = False,
    in_time: Callable[[], bool] = lambda: True,
) -> Prediction | None:
    """Measure random policies within a budget and compare them with the sums of their scores.

    Args:
        space: The budget and the scores.
        meter: What measures policies.
        batches: A small sample, see `SAMPLES`.
        unit: Unit of the scores, see `Indicators.unit`.
        parts: The scores of weights and inputs, which add up to the scores.
        seed: Seed of the random policies.
        policies: Number of policies.
        refit: Whether to refit the scores even if they predict well.
        in_time: Tells whether there is time to measure another policy.

    Returns:
        The check, or None if fewer than `LEAST_POLICIES` different policies exist or were measured in time, or if all
        of them have the same divergence.
    """
    began, before = time.perf_counter(), meter.forwards
    found: list[tuple[Policy, bool]] = []
    means: list[float] = []
    samples = items = 0
    for policy, of_scores in random_policies(space, policies, seed):
        if not in_time():
            break
        sums, counts = meter.measure_samples(policy, batches)
        value = float(sums.sum() / counts.sum())
        found.append((policy, of_scores))
        means.append(value if np.isfinite(value) else np.inf)
        samples, items = len(counts), int(counts.sum())
    if len(found) < LEAST_POLICIES:
        return None
    measured = np.array(means)
    if (measured == measured[0]).all():  # the outputs never change, or are never finite
        return None
    predicted = np.array([space.predicted(policy) for policy, _ in found], dtype=np.float64)
    slope = None
    if unit in DIVERGENCES:
        usable = predicted > 0
        slope = float(np.median(measured[usable] / predicted[usable])) if usable.any() else math.inf
    sign = 1 if space.sense == "min" else -1
    told = (predicted != predicted[0]).any()  # equal predictions have no ranking
    rank = rank_correlation(sign * predicted, measured) if told else 0.0
    check = PredictionCheck(rank, slope, len(found), samples, items)
    scores = None
    if (refit or not check.good) and sign > 0:
        check, scores = _refitted(check, space, parts, [policy for policy, _ in found], measured)
    check = replace(check, seconds=time.perf_counter() - began, forwards=meter.forwards - before)
    return Prediction(check, tuple(p for p, _ in found), tuple(o for _, o in found), tuple(means), scores)


# the refit: measured ≈ Σ over groups of layers of factor · (sum of the scores of the group)


def _by_kind(layer: LayerSpec, operand: str, bits: int) -> str:
    depthwise = layer.kind == "conv2d" and layer.weight_shape[1] == 1
    return f"{operand} {'depthwise' if depthwise else layer.kind}"


def _by_width(layer: LayerSpec, operand: str, bits: int) -> str:
    return f"{operand} {bits}"


def _together(layer: LayerSpec, operand: str, bits: int) -> str:
    return "all"


GROUPINGS: tuple[Callable[[LayerSpec, str, int], str], ...] = (_together, _by_kind, _by_width)
"""Groups that have one factor in a refit: all scores, operands of one kind of layer, or operands at one bit-width.

This is our construction.
"""


def _refitted(
    check: PredictionCheck, space: SearchSpace, parts: Parts, policies: Sequence[Policy], measured: Vector
) -> tuple[PredictionCheck, Scores | None]:
    """Refit the scores to measurements, if that predicts held-out policies better.

    For each grouping, each third of the policies is predicted by a fit on the others. The grouping with the smallest
    error, the median of |log(predicted / measured)|, is kept if its error is smaller than that of the scores themselves
    and its ranking is not worse. Scores without a unit of divergence are first multiplied by their best factor.

    Returns:
        The check with the figures of the refit, and the refitted scores or None.
    """
    usable = np.isfinite(measured) & (measured > 0)
    if usable.sum() < LEAST_POLICIES:
        return check, None
    kept, y = [p for p, ok in zip(policies, usable, strict=True) if ok], measured[usable]
    fold = np.arange(len(y)) // 2 % FOLDS  # both kinds of policies in each fold
    best, scores = (math.inf, 0.0, 0.0), None
    for group_of in GROUPINGS:
        names, features = _features(space, parts, kept, group_of)
        raw, held = features.sum(1), np.empty(len(y))
        if raw.min() <= 0:
            return check, None
        for k in range(FOLDS):
            train = fold != k
            held[~train] = features[~train] @ fit_factors(features[train], y[train])
        own = rank_correlation(raw, y)
        rank = own if len(names) == 1 else rank_correlation(held, y)  # one factor does not change the order
        miss = _miss(held, y)
        if miss < best[0]:
            best, scores = (miss, rank, float(np.median(y / np.maximum(held, 1e-300)))), None
            plain = raw if check.slope is not None else raw * float(np.median(y / raw))
            if miss < _miss(plain, y) and rank >= own:
                factors = fit_factors(features, y)
                scores = _scaled(space, parts, dict(zip(names, factors.tolist(), strict=True)), group_of)
    return replace(check, refitted=scores is not None, spearman_refit=best[1], slope_refit=best[2]), scores


def _miss(predicted: Vector, measured: Vector) -> float:
    return float(np.median(np.abs(np.log(np.maximum(predicted, 1e-300) / measured))))


def _features(
    space: SearchSpace, parts: Parts, policies: Sequence[Policy], group_of: Callable[[LayerSpec, str, int], str]
) -> tuple[list[str], Vector]:
    """Return the names of the groups and the sum of the scores of each group, `[policies, groups]`."""
    rows: list[dict[str, float]] = []
    for policy in policies:
        row: dict[str, float] = {}
        for layer in space.graph.searched:
            bits = policy.bits[layer.name]
            weight, activation = parts[layer.name][bits]
            for operand, width, value in (("weight", bits.weight, weight), ("input", bits.activation, activation)):
                name = group_of(layer, operand, width)
                row[name] = row.get(name, 0.0) + value
        rows.append(row)
    names = sorted({name for row in rows for name, value in row.items() if value})
    return names, np.array([[row.get(name, 0.0) for name in names] for row in rows]).reshape(len(rows), len(names))


def _scaled(
    space: SearchSpace,
    parts: Parts,
    factors: Mapping[str, float],
    group_of: Callable[[LayerSpec, str, int], str],
) -> Scores:
    """Multiply each part of the scores by the factor of its group; groups without a factor have the mean factor."""
    mean = float(np.mean(list(factors.values())))
    out: dict[str, dict[LayerBits, float]] = {}
    for layer in space.graph.searched:
        out[layer.name] = {
            bits: weight * factors.get(group_of(layer, "weight", bits.weight), mean)
            + activation * factors.get(group_of(layer, "input", bits.activation), mean)
            for bits, (weight, activation) in parts[layer.name].items()
        }
    return out


def fit_factors(features: Vector, measured: Vector) -> Vector:
    """Fit a nonnegative factor for each group: measured ≈ features · factors.

    The fit minimizes the squared relative error, with Huber's weights beyond 1.345 deviations and a ridge penalty
    towards the common factor, the median of measured / predicted. The ridge assumes that factors have a deviation of
    `SPREAD` and errors have that of the residuals; it is our construction.

    Args:
        features: Sums of scores, `[policies, groups]`, nonnegative and not all zero in a row.
        measured: Measured divergences, `[policies]`, above zero.

    Returns:
        The factors, `[groups]`.
    """
    common = float(np.median(measured / features.sum(1)))
    a = common * features / measured[:, None]
    factors = np.ones(a.shape[1])
    free = max(len(a) - a.shape[1], 1)
    for _ in range(20):
        error = np.abs(a @ factors - 1)
        noise = max(1.4826 * float(np.median(error)) * math.sqrt(len(a) / free), 1e-3)
        ridge = (noise / SPREAD) ** 2
        weight = np.minimum(1.0, 1.345 * noise / np.maximum(error, 1e-12))
        gram, right = (a * weight[:, None]).T @ a, a.T @ weight
        before = factors.copy()
        for _ in range(50):  # coordinate descent keeps the factors nonnegative
            for g in range(len(factors)):
                rest = right[g] - gram[g] @ factors + gram[g, g] * factors[g]
                factors[g] = max((rest + ridge) / (gram[g, g] + ridge), 0.0)
        if np.abs(factors - before).max() < 1e-9:
            break
    return common * factors
