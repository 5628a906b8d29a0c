"""Does the sum of scores predict what a policy measures? A check over random policies, and scores refitted to it."""

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
"""How many random policies a check measures."""
LEAST_POLICIES = 9
"""With fewer that differ nothing is said."""
SAMPLES, TOKENS = 128, 512
"""What each of them is measured on: up to so many samples, or tokens."""
SIGMAS = (0.35, 0.8)
"""Deviation of the logarithm of perturbed scores, least and greatest."""
SPREAD = 0.5
"""How far the factors of a refit are expected to be from their common one."""
FOLDS = 3

Parts = Mapping[str, Mapping[LayerBits, tuple[float, float]]]
"""{layer: {widths: (score of its weight, score of its input)}}; they add up to its score."""
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """A check with what it measured.

    Args:
        check: Its figures.
        policies: The policies.
        perturbed: Which of them are optima of perturbed scores; the others owe nothing to the scores.
        measured: Divergence of each policy.
        refit: Scores refitted to the measurements, in the measurement's unit; None where they do not predict better.
    """

    check: PredictionCheck
    policies: tuple[Policy, ...]
    perturbed: tuple[bool, ...]
    measured: tuple[float, ...]
    refit: Scores | None


def random_policies(space: SearchSpace, count: int, seed: int) -> list[tuple[Policy, bool]]:
    """Policies that fill a budget and differ from each other: (policy, whether it comes from the scores).

    By turns the greedy fill at random worths of layers, and the optimum of scores perturbed by 0.35 to 0.8.

    Args:
        space: The budget and the scores.
        count: How many; fewer where the budget leaves fewer.
        seed: Of what is drawn.
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
    """Measure random policies of a budget and lay them beside the sums of their scores.

    Args:
        space: The budget and the scores.
        meter: What measures.
        batches: A small sample, see `SAMPLES`.
        unit: Of the scores, see `Indicators.unit`.
        parts: What the scores consist of.
        seed: Of the random policies.
        policies: How many.
        refit: Refit the scores also where they predict well.
        in_time: Whether another policy may be measured.

    Returns:
        None where fewer than `LEAST_POLICIES` policies differ, or the time did not allow for so many, or all of them
        measure the same.
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
    if (measured == measured[0]).all():  # of outputs that never change, or are never finite
        return None
    predicted = np.array([space.predicted(policy) for policy, _ in found], dtype=np.float64)
    slope = None
    if unit in DIVERGENCES:
        usable = predicted > 0
        slope = float(np.median(measured[usable] / predicted[usable])) if usable.any() else math.inf
    sign = 1 if space.sense == "min" else -1
    told = (predicted != predicted[0]).any()  # equal predictions rank nothing
    rank = rank_correlation(sign * predicted, measured) if told else 0.0
    check = PredictionCheck(rank, slope, len(found), samples, items)
    scores = None
    if (refit or not check.good) and sign > 0:
        check, scores = _refitted(check, space, parts, [policy for policy, _ in found], measured)
    check = replace(check, seconds=time.perf_counter() - began, forwards=meter.forwards - before)
    return Prediction(check, tuple(p for p, _ in found), tuple(o for _, o in found), tuple(means), scores)


# the refit: measured ≈ Σ over groups of layers of factor · (sum of the group's scores)


def _by_kind(layer: LayerSpec, operand: str, bits: int) -> str:
    depthwise = layer.kind == "conv2d" and layer.weight_shape[1] == 1
    return f"{operand} {'depthwise' if depthwise else layer.kind}"


def _by_width(layer: LayerSpec, operand: str, bits: int) -> str:
    return f"{operand} {bits}"


def _together(layer: LayerSpec, operand: str, bits: int) -> str:
    return "all"


GROUPINGS: tuple[Callable[[LayerSpec, str, int], str], ...] = (_together, _by_kind, _by_width)
"""What a refit gives one factor: all scores, operands of layers of one kind, or operands at one width [our
construction]."""


def _refitted(
    check: PredictionCheck, space: SearchSpace, parts: Parts, policies: Sequence[Policy], measured: Vector
) -> tuple[PredictionCheck, Scores | None]:
    """(the check with its refit's figures, the scores where they predict held-out policies better).

    Each third of the policies is predicted by fits on the others, of each grouping. The one that misses least (median
    of |log(predicted / measured)|) is kept if it misses by less than the scores themselves, which for scores that have
    no unit of divergence are their best multiple, and ranks no worse.
    """
    usable = np.isfinite(measured) & (measured > 0)
    if usable.sum() < LEAST_POLICIES:
        return check, None
    kept, y = [p for p, ok in zip(policies, usable, strict=True) if ok], measured[usable]
    fold = np.arange(len(y)) // 2 % FOLDS  # policies of both origins in each fold
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
        rank = own if len(names) == 1 else rank_correlation(held, y)  # one factor leaves the order as it is
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
    """(names of the groups, sum of each group's scores [policies, groups])."""
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
    """The scores with each part times its group's factor; a group that no policy showed has the mean factor."""
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
    """The factor of each group: measured ≈ features · factors, factors not negative.

    Least squares of the relative error, Huber's weights beyond 1.345 deviations, and a ridge towards the common factor,
    the median of measured over predicted. The ridge is that of factors with a deviation of `SPREAD` and errors with
    the deviation that the factors leave [our construction].

    Args:
        features: [policies, groups], not negative, above zero in each row.
        measured: [policies], above zero.
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
        for _ in range(50):  # coordinate descent keeps factors from below zero
            for g in range(len(factors)):
                rest = right[g] - gram[g] @ factors + gram[g, g] * factors[g]
                factors[g] = max((rest + ridge) / (gram[g, g] + ridge), 0.0)
        if np.abs(factors - before).max() < 1e-9:
            break
    return common * factors
