"""The check of scores against measurements, and the refit."""

import numpy as np
import pytest
from validation_toys import Meter, added, batches_of, graph_of, parts_of, space_of, truth_of

from hub_mpq.core import PredictionCheck
from hub_mpq.search.prediction import check_prediction, fit_factors, random_policies

SENSITIVITY = [1.0, 8.0, 2.0, 0.5, 30.0, 4.0]


@pytest.fixture
def graph():
    return graph_of()


def checked(graph, parts, true_parts, noise=0.02, unit="kl", **options):
    space = space_of(graph, parts, bitops="W3A3")
    meter = Meter(truth_of(graph, true_parts), noise)
    return check_prediction(space, meter, batches_of(128), unit=unit, parts=parts, **options)


def test_random_policies_differ_fill_the_budget_and_come_again(graph):
    space = space_of(graph, parts_of(graph, SENSITIVITY), bitops="W3A3")
    found = random_policies(space, 20, seed=3)
    assert len(found) == 20
    assert len({tuple(p.bits.values()) for p, _ in found}) == 20
    assert sum(of_scores for _, of_scores in found) == 10
    assert all(0.9 < space.fill(policy) <= 1 for policy, _ in found)
    assert found == random_policies(space, 20, seed=3)
    assert found != random_policies(space, 20, seed=4)


def test_scores_that_are_the_truth_pass(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = checked(graph, parts, parts)
    assert found.check.spearman > 0.97
    assert found.check.slope == pytest.approx(1, abs=0.05)
    assert found.check.good
    assert (found.check.policies, found.check.samples, found.check.items) == (20, 128, 128)
    assert found.check.spearman_refit is None
    assert found.refit is None
    assert "Spearman 0.9" in str(found.check) or "Spearman 1.0" in str(found.check)


def test_scores_in_another_unit_have_no_slope(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = checked(graph, parts, parts_of(graph, [100 * s for s in SENSITIVITY]), unit="scale")
    assert found.check.slope is None
    assert found.check.good


def test_scores_of_the_wrong_size_are_told_and_refitted(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = checked(graph, parts, parts_of(graph, [3 * s for s in SENSITIVITY]))
    assert found.check.slope == pytest.approx(3, abs=0.1)
    assert not found.check.good
    assert "poor" in str(found.check)
    assert found.check.refitted
    assert found.check.slope_refit == pytest.approx(1, abs=0.1)


def test_a_refit_finds_the_factor_of_a_group_and_is_kept(graph):
    """Weights count ten times as much as the scores say, and inputs a tenth."""
    parts = parts_of(graph, SENSITIVITY, [5.0, 1.0, 9.0, 2.0, 3.0, 20.0])
    truth = {n: {b: (10 * w, a / 10) for b, (w, a) in row.items()} for n, row in parts.items()}
    found = checked(graph, parts, truth)
    assert not found.check.good
    assert found.check.refitted
    assert found.check.spearman_refit > max(0.9, found.check.spearman)
    assert found.check.slope_refit == pytest.approx(1, abs=0.15)
    wanted = added(truth)
    ratios = [found.refit[n][b] / wanted[n][b] for n, row in wanted.items() for b in row]
    assert 0.6 < np.median(ratios) < 1.6
    assert "kept" in str(found.check)


def test_a_refit_that_predicts_nothing_is_not_kept(graph):
    """What policies measure has nothing to do with their scores."""
    parts = parts_of(graph, SENSITIVITY)
    space = space_of(graph, parts, bitops="W3A3")

    def truth(policy):
        return float(np.exp(np.random.default_rng([sum(map(ord, str(policy.to_dict())))]).normal()))

    found = check_prediction(space, Meter(truth), batches_of(128), unit="kl", parts=parts)
    assert not found.check.good
    assert not found.check.refitted
    assert found.check.spearman_refit is not None
    assert found.refit is None


def test_no_check_without_the_time_for_enough_policies(graph):
    parts = parts_of(graph, SENSITIVITY)
    calls = iter([True] * 5 + [False] * 100)
    assert checked(graph, parts, parts, in_time=lambda: next(calls)) is None


def test_factors_are_found_beside_an_outlier_and_never_negative():
    rng = np.random.default_rng(0)
    features = rng.lognormal(size=(20, 3))
    wanted = np.array([2.0, 0.5, 1.0])
    measured = features @ wanted * rng.normal(1, 0.02, 20)
    measured[4] *= 30
    factors = fit_factors(features, measured)
    np.testing.assert_allclose(factors, wanted, rtol=0.2)
    factors = fit_factors(features, np.maximum(features @ np.array([2.0, -0.8, 1.0]), 0.1))
    assert (factors >= 0).all()


@pytest.mark.parametrize(
    ("spearman", "slope", "good"), [(0.8, 1.0, True), (0.79, 1.0, False), (0.9, 2.1, False), (0.9, None, True)]
)
def test_what_a_good_prediction_is(spearman, slope, good):
    assert PredictionCheck(spearman, slope, 20, 128, 128).good is good


def test_scores_that_are_all_alike_predict_nothing(graph):
    parts = parts_of(graph, SENSITIVITY)
    flat = {name: dict.fromkeys(row, (0.0, 0.0)) for name, row in parts.items()}
    found = checked(graph, flat, parts)
    assert found.check.spearman == 0
    assert found.check.slope == np.inf
    assert not found.check.good


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_model_that_no_policy_changes_says_nothing_of_scores(graph, value):
    parts = parts_of(graph, SENSITIVITY)
    space = space_of(graph, parts, bitops="W3A3")
    assert check_prediction(space, Meter(lambda policy: value), batches_of(128), unit="kl", parts=parts) is None
