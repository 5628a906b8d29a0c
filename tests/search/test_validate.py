"""A policy is measured before it is returned."""

import json
import math

import pytest
import torch
from validation_toys import Meter, batches_of, graph_of, optimum_of, parts_of, space_of, truth_of

from hub_mpq.core import Candidates, LayerBits, Policy
from hub_mpq.report import measurements
from hub_mpq.search import validate as module
from hub_mpq.search.held_out import hold_out
from hub_mpq.search.paired import difference_of, mean_of
from hub_mpq.search.validate import validated

SENSITIVITY = [1.0, 8.0, 2.0, 0.5, 30.0, 4.0]


@pytest.fixture
def graph():
    return graph_of()


def candidates_for(graph, widths=(2, 3, 4, 5, 6)):
    return {x.name: Candidates.of(widths) for x in graph.searched}


def run(graph, parts, meter, batches=None, seconds=60.0, widths=None, unit="kl", **limits):
    space = space_of(graph, parts, **(limits or {"bitops": "W4A4"}))
    held = hold_out(meter, batches or batches_of(), "toy samples")
    widths = candidates_for(graph) if widths is None else widths
    return validated(optimum_of(space), space, meter, held, candidates=widths, unit=unit, parts=parts, seconds=seconds)


def test_reversed_scores_give_uniform(graph):
    truth = parts_of(graph, SENSITIVITY)
    wrong = parts_of(graph, [1 / s for s in SENSITIVITY])
    found = run(graph, wrong, Meter(truth_of(graph, truth), 0.1))
    assert found.chosen_by == "uniform"
    assert found.policy == Policy.uniform(graph, "W4A4")
    assert found.optimum != found.policy
    assert found.usage["searched_bitops"] == 6 * 5000 * 16
    assert found.status == "optimal", "said of the optimum"
    assert "uniform W4A4 is returned because it measured better than the optimum" in found.validation.verdict
    assert not found.check.good
    rows = {row.name: row for row in found.measurements}
    assert next(iter(rows)) == "optimum"
    assert rows["uniform W4A4"].difference < -1.96 * rows["uniform W4A4"].difference_error
    assert rows["uniform W4A4"].divergence == pytest.approx(truth_of(graph, truth)(found.policy), rel=0.05)
    assert rows["optimum"].predicted == pytest.approx(found.objective)


def test_scores_that_are_the_truth_keep_the_optimum(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = run(graph, parts, Meter(truth_of(graph, parts), 0.1))
    assert found.chosen_by == "optimum"
    assert found.policy == found.optimum
    assert "the optimum is kept because it measured better than uniform W4A4" in found.validation.verdict
    assert found.check.good
    names = [row.name for row in found.measurements]
    assert names[:2] == ["optimum", "uniform W4A4"]
    assert 1 <= len(names) - 2 <= 3
    assert all(name.startswith("level") for name in names[2:])
    assert all(row.policy.bits["stem"] == LayerBits(8, 8) for row in found.measurements)


def test_a_tie_is_called_a_tie(graph):
    """Each policy has errors of its own, which cancel over the samples."""

    def shift(policy, sample):
        return (-1) ** sample * 0.01 * sum(bits.weight for bits in policy.bits.values())

    found = run(graph, parts_of(graph, SENSITIVITY), Meter(lambda policy: 1.0, shift=shift))
    assert found.chosen_by == "optimum"
    assert "its difference from uniform W4A4 is within noise" in found.validation.verdict


def test_what_chooses_is_not_what_is_reported(graph):
    parts = parts_of(graph, SENSITIVITY)
    meter = Meter(truth_of(graph, parts), 0.1)
    found = run(graph, parts, meter)
    sets = {frozenset(samples) for _, samples in meter.seen if len(samples) == 160}
    assert len(sets) == 2
    assert not frozenset.intersection(*sets)
    small = [set(samples) for _, samples in meter.seen if len(samples) < 160]
    choosing = next(s for s in sets if any(few <= s for few in small))
    assert all(few <= choosing for few in small), "a check looked at reporting samples"
    assert {(row.samples, row.items) for row in found.measurements} == {(160, 160)}
    assert (found.validation.choosing, found.validation.reporting) == (160, 160)
    assert found.validation.forwards == meter.forwards


def test_uniform_is_returned_where_the_reporting_samples_say_so(graph):
    """On the choosing samples a level beats all; on the others it is the worst."""
    parts = parts_of(graph, SENSITIVITY)
    batches = batches_of()
    chosen_on = {i for batch in batches[::2] for i in batch}
    level = Policy.uniform(graph, "W3A5")

    def shift(policy, sample):
        if policy != level:
            return 0.0
        return -1.0 if sample in chosen_on else 1.0

    found = run(graph, parts, Meter(lambda policy: 2.0, 0.1, shift), batches)
    assert found.policy != level
    assert "which was chosen on the choosing samples" in found.validation.verdict
    uniform, mine = (
        next(r for r in found.measurements if r.name.startswith("uniform")),
        next(r for r in found.measurements if r.policy == found.policy),
    )
    assert mine.divergence <= uniform.divergence + 1.96 * uniform.difference_error


def test_the_optimum_gives_way_where_reporting_samples_alone_find_it_worse(graph):
    parts = parts_of(graph, SENSITIVITY)
    best = optimum_of(space_of(graph, parts, bitops="W4A4")).policy
    batches = batches_of()
    reported_on = {i for batch in batches[1::2] for i in batch}

    def shift(policy, sample):
        return 1.0 if policy == best and sample in reported_on else 0.0

    found = run(graph, parts, Meter(lambda policy: 2.0 - (policy == best), 0.1, shift), batches)
    assert found.chosen_by == "optimum", "level with uniform there"

    def worse(policy, sample):
        return 2 * shift(policy, sample)

    found = run(graph, parts, Meter(lambda policy: 2.0 - (policy == best), 0.1, worse), batches)
    assert found.chosen_by == "uniform"
    expected = "it measured better on the reporting samples than the optimum, which was chosen on the choosing samples"
    assert expected in found.validation.verdict


def test_a_better_level_is_returned_by_its_name(graph):
    level = Policy.uniform(graph, "W3A5")
    parts = parts_of(graph, SENSITIVITY)
    found = run(graph, parts, Meter(lambda policy: 1.0 if policy == level else 2.0, 0.1))
    assert (found.chosen_by, found.policy) == ("level W3A5", level)


def test_without_a_common_level_the_greedy_fill_is_compared(graph):
    parts = parts_of(graph, SENSITIVITY)
    kept = {f"body.{i}": {2, 3} if i < 3 else {4, 5} for i in range(6)}
    parts = {n: {b: v for b, v in row.items() if {b.weight, b.activation} <= kept[n]} for n, row in parts.items()}
    widths = {name: Candidates.of(sorted(found)) for name, found in kept.items()}
    found = run(graph, parts, Meter(truth_of(graph, parts), 0.1), widths=widths, bitops="W4A4")
    assert [row.name for row in found.measurements] == ["optimum", "greedy fill"]
    assert "no level meets each limit" in found.validation.verdict
    assert all(space_of(graph, parts, bitops="W4A4").fill(row.policy) <= 1 for row in found.measurements)


def test_a_level_that_passes_a_limit_is_not_uniform(graph):
    parts = parts_of(graph, SENSITIVITY)
    space = space_of(graph, parts, bitops="W4A4", weight_bits=3.0)
    levels = space.levels(candidates_for(graph))
    assert levels[0] == LayerBits(3, 5)
    assert LayerBits(4, 4) not in levels
    assert all(space.fill(Policy.uniform(graph, level)) <= 1 for level in levels)
    assert space.fill(Policy.uniform(graph, "W4A4")) is None


@pytest.mark.parametrize("level", ["W2A2", "W3A3", "W4A4", "W2A5"])
def test_the_level_of_the_budget_is_uniform(graph, level):
    space = space_of(graph, parts_of(graph, SENSITIVITY), bitops=level, size=level)
    assert space.levels(candidates_for(graph))[0] == LayerBits.parse(level)


def test_low_budgets_measure_perturbed_and_refitted_optima(graph):
    truth = parts_of(graph, SENSITIVITY)
    wrong = parts_of(graph, SENSITIVITY, [1.0] * 6)
    meter = Meter(truth_of(graph, truth), 0.02)
    found = run(graph, wrong, meter, bitops="W3A3")
    assert found.chosen_by in ("perturbed", "refit")
    mine = next(row for row in found.measurements if row.policy == found.policy)
    assert mine.difference < -1.96 * mine.difference_error
    assert found.check.spearman_refit is not None
    again = run(graph, wrong, Meter(truth_of(graph, truth), 0.02), bitops="W3A3")
    assert (again.policy, again.measurements) == (found.policy, found.measurements)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only measuring spends."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def test_when_there_is_no_time_it_says_so(graph, clock):
    parts = parts_of(graph, [1 / s for s in SENSITIVITY])
    truth = truth_of(graph, parts_of(graph, SENSITIVITY))
    found = run(graph, parts, Meter(truth, spend=clock), seconds=0.5)
    assert not found.validation.done
    assert str(found.validation).startswith("not validated: 0.5 s")
    assert (found.policy, found.chosen_by, found.measurements) == (found.optimum, "optimum", ())


def test_with_little_time_optimum_and_uniform_are_compared_on_fewer(graph, clock):
    parts = parts_of(graph, [1 / s for s in SENSITIVITY])
    truth = truth_of(graph, parts_of(graph, SENSITIVITY))
    found = run(graph, parts, Meter(truth, 0.1, spend=clock), seconds=30)
    assert found.validation.done
    assert found.chosen_by == "uniform"
    assert found.validation.choosing < 160
    assert found.validation.seconds <= 30


def test_few_samples_validate_nothing(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = run(graph, parts, Meter(truth_of(graph, parts)), [list(range(6)), list(range(6, 12))])
    assert not found.validation.done
    assert "only 12 samples are held out" in str(found.validation)


def test_a_broken_policy_is_never_taken_and_a_broken_optimum_never_kept(graph):
    parts = parts_of(graph, SENSITIVITY)
    best = optimum_of(space_of(graph, parts, bitops="W4A4")).policy
    level = Policy.uniform(graph, "W3A5")

    def truth(policy):
        return math.nan if policy in (best, level) else 1.0

    found = run(graph, parts, Meter(truth, 0.1))
    assert found.policy not in (best, level)
    json.dumps(found.to_dict(), allow_nan=False)
    rows = [line for line in measurements(found).splitlines() if line.startswith(("optimum", "level W3A5"))]
    assert any("not finite" in row for row in rows)
    assert "inf" not in measurements(found).split("chosen on")[0]


def test_a_model_that_breaks_at_every_policy_is_not_called_a_tie(graph):
    parts = parts_of(graph, SENSITIVITY)
    found = run(graph, parts, Meter(lambda policy: math.nan))
    assert str(found.validation) == "not validated: the outputs of the optimum and of uniform W4A4 are not finite"


def test_a_choice_that_the_reporting_samples_do_not_confirm_says_so(graph):
    """A level is better on the choosing samples only; on the others it is like the rest."""
    parts = parts_of(graph, SENSITIVITY)
    batches, level = batches_of(), Policy.uniform(graph, "W5A3")
    chosen_on = {i for batch in batches[::2] for i in batch}

    def shift(policy, sample):
        return -1.0 if policy == level and sample in chosen_on else 0.0

    found = run(graph, parts, Meter(lambda policy: 2.0, 0.1, shift), batches)
    assert found.chosen_by == "level W5A3"
    assert "(on the reporting ones the difference is within noise)" in found.validation.verdict
    everywhere = run(graph, parts, Meter(lambda policy: 2.0 - (policy == level), 0.1), batches)
    assert everywhere.chosen_by == "level W5A3"
    assert "within noise" not in everywhere.validation.verdict


def test_time_for_few_samples_only_is_not_blamed_on_the_data(graph, clock):
    parts = parts_of(graph, SENSITIVITY)
    found = run(graph, parts, Meter(truth_of(graph, parts), spend=clock), batches_of(size=4), seconds=12)
    assert found.validation.verdict == "only 8 samples could be measured in time, and at least 16 are needed"


def test_what_a_policy_costs_before_its_first_batch_is_foreseen(graph, clock):
    """Of the norms that each policy estimates anew, the optimum's tell what uniform's will take."""
    parts = parts_of(graph, SENSITIVITY)
    began = []

    class Slow(Meter):
        def measure_samples(self, policy, batches):
            if policy not in began:
                began.append(policy)
                clock(10)
            return super().measure_samples(policy, batches)

    found = run(graph, parts, Slow(truth_of(graph, parts), 0.1, spend=clock), seconds=50)
    assert found.validation.done
    assert found.validation.seconds <= 50


def test_standard_errors_are_paired_and_by_sample():
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.rand(400, generator=generator).double(), torch.randn(400, generator=generator).double()
    ones = torch.ones(400, dtype=torch.float64)
    a, b = (10 * sample, ones), (10 * sample + 0.1 + 0.01 * noise, ones)
    assert difference_of(b, a)[0] == pytest.approx(0.1, abs=0.003)
    assert difference_of(b, a)[1] < 0.001 < mean_of(a)[1], "what samples have in common is no noise"
    assert mean_of(a)[1] == pytest.approx(float((10 * sample).std()) / 20, rel=1e-3)
    tokens = (8 * a[0], 8 * ones)  # eight tokens a sample, all alike: no more is known than of the samples
    assert mean_of(tokens) == pytest.approx(mean_of(a))
