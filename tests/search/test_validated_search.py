"""Measuring before a policy is returned, from HubMPQ's own calls."""

import copy
import json
import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq import HubMPQ, Policy
from hub_mpq.core import Indicators
from hub_mpq.core.files import PACKED
from hub_mpq.errors import InvalidArgument
from hub_mpq.pack import read_manifest

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
UNTRAINED = {"epochs": 0, "indicator_options": {"steps": 0}}


@pytest.fixture
def mpq(net):
    return HubMPQ.from_module(net, X[:1])


def one_sided_scores(mpq, layer):
    """Scores that send all bits to one layer."""
    rows = {x.name: {b: (1.0 if x.name == layer else 1e-6) * 4.0**-b for b in range(2, 7)} for x in mpq.graph.searched}
    return Indicators(rows, rows, provenance={"unit": "kl", "task": "classification"})


def test_quantize_measures_on_val_and_tells(mpq, net, train, val, tmp_path):
    before = copy.deepcopy(net.state_dict())
    mpq.quantize(bitops="W4A4", train=train, val=val, **UNTRAINED)
    found = mpq.result
    assert found.validation.done
    assert (found.validation.data, found.validation.choosing, found.validation.reporting) == ("val", 48, 48)
    assert mpq.policy == found.policy
    assert mpq.usage()["bitops"] <= mpq.usage("W4A4")["bitops"]
    assert {row.items for row in found.measurements} == {48}
    assert {"optimum", "uniform W4A4"} <= {row.name for row in found.measurements}
    assert found.check is None, "48 samples are too few to say anything of a prediction"
    assert "uniform W4A4" in mpq.report()
    assert str(found.validation) in mpq.report()
    assert mpq.seconds["validate"] > 0
    json.dumps(found.to_dict(), allow_nan=False)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "the user's network was changed"
    mpq.save_pretrained(tmp_path)
    told = read_manifest(tmp_path / PACKED).provenance["search"]
    assert told["chosen_by"] == found.chosen_by
    assert ("status" in told) == (found.policy == found.optimum)


def test_the_measured_figures_are_those_of_the_applied_policies(mpq, train, val):
    mpq.quantize(bitops="W4A4", train=train, val=val, **UNTRAINED)
    found = mpq.result
    x = torch.cat([batch for batch, _ in val])
    float_logits = mpq.float_model(x).log_softmax(-1)
    for row in found.measurements:
        quantized = mpq.apply_policy(row.policy, train).model
        with torch.no_grad():
            kl = (float_logits.exp() * (float_logits - quantized(x).log_softmax(-1))).sum(-1)
        # half of these 96 samples were reported on
        assert row.divergence == pytest.approx(float(kl.mean()), abs=6 * row.standard_error)


def test_bad_scores_never_cost_more_than_uniform(mpq, train, val):
    scores = one_sided_scores(mpq, "9")
    mpq.quantize(bitops="W4A4", train=train, val=val, indicators=scores, **UNTRAINED)
    rows = {row.name: row for row in mpq.result.measurements}
    mine = next(row for row in rows.values() if row.policy == mpq.policy)
    uniform = rows["uniform W4A4"]
    assert rows["optimum"].divergence > uniform.divergence, "these scores were to be bad"
    assert mine.divergence <= uniform.divergence + 1.96 * uniform.difference_error
    assert mpq.policy != mpq.result.optimum


def test_without_val_it_measures_on_training_batches_that_nothing_was_scored_on(mpq, data):
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    train = DataLoader(Watched(*data.tensors), batch_size=4)
    mpq.train_indicators(train, steps=0)
    scored = set(seen)
    mpq.quantize(bitops="W4A4", train=train, epochs=0)
    found = mpq.result.validation
    assert found.data == "training batches not used for the scores"
    assert (found.choosing, found.reporting) == (16, 16), "24 batches less the 16 that calibrate"
    assert max(scored) < 64


def test_few_training_batches_validate_nothing(mpq, train):
    mpq.quantize(bitops="W4A4", train=train, **UNTRAINED)
    assert "not validated: all training batches were used for the scores" in mpq.report()
    assert mpq.policy == mpq.result.optimum


def test_validation_can_be_off_or_on_batches_of_its_own(mpq, train, val, data):
    mpq.quantize(bitops="W4A4", train=train, val=val, validate=False, **UNTRAINED)
    assert mpq.result.validation is None
    assert mpq.result.measurements == ()
    images = [data.tensors[0][:40], data.tensors[0][40:]]
    mpq.quantize(bitops="W4A4", train=train, validate=images, **UNTRAINED)
    assert (mpq.result.validation.data, mpq.result.validation.choosing) == ("the batches given", 48)
    with pytest.raises(InvalidArgument, match="validate must hold at least one batch"):
        mpq.quantize(bitops="W4A4", train=train, validate=[], **UNTRAINED)
    for seconds in (0, -1.0):
        with pytest.raises(InvalidArgument, match="validate_seconds"):
            mpq.quantize(bitops="W4A4", train=train, val=val, validate_seconds=seconds, **UNTRAINED)


def test_without_data_it_says_that_nothing_was_measured(mpq):
    with pytest.warns(UserWarning, match="no training data"):
        mpq.quantize(bitops="W4A4")
    assert str(mpq.result.validation) == "not validated: no data to measure on; pass train=, val= or validate="


def test_search_and_pareto_measure_when_told(mpq, train, val):
    mpq.train_indicators(train, steps=0)
    plain = mpq.search(bitops="W4A4")
    assert plain.validation is None
    assert plain.chosen_by == "optimum"
    found = mpq.search(bitops="W4A4", validate=val)
    assert found.optimum == plain.policy
    assert found.validation.done
    assert found.validation.choosing + found.validation.reporting == 48, "half of three batches calibrate"
    assert mpq.policy is None
    again = mpq.search(bitops="W4A4", validate=val)
    assert (again.policy, again.measurements) == (found.policy, found.measurements)
    front = mpq.pareto(points=3, validate=val)
    assert all(point.validation is not None for point in front)
    assert all(point.validation is None for point in mpq.pareto(points=3))


def test_the_order_of_val_does_not_decide_what_is_measured(mpq, data):
    """A val that is sorted by class is read from all over."""
    x, y = (torch.cat([t] * 40) for t in data.tensors)
    order = y.argsort(stable=True)
    ordered = DataLoader(TensorDataset(x[order], y[order]), batch_size=64)
    from hub_mpq.search.held_out import spread

    first = next(iter(spread(ordered, 0)))[1]
    assert len(first.unique()) == len(y.unique()) > 2
    assert torch.equal(next(iter(ordered))[1], y[order][:64])
    assert torch.equal(next(iter(spread(ordered, 0)))[1], first)


def test_a_policy_of_uniform_widths_reports_no_rival(mpq, train, val):
    mpq.train_indicators(train, steps=0)
    found = mpq.search(bitops="W2A2", validate=val)
    assert found.policy == Policy.uniform(mpq.graph, "W2A2")
    assert "the optimum is uniform W2A2 itself" in found.validation.verdict


@pytest.mark.parametrize(
    ("validate", "message"),
    [
        (True, "must be batches"),
        ("images", "must be batches"),
        ([], "must hold at least one batch"),
        ([X[:1]], "must hold more than one sample"),
        ([X[:1], X[1:]], "at least two samples"),
    ],
)
@pytest.mark.parametrize("call", ["search", "pareto"])
def test_what_cannot_be_measured_on_is_named(mpq, train, call, validate, message):
    mpq.train_indicators(train, steps=0)
    more = {"bitops": "W4A4"} if call == "search" else {"points": 2}
    with pytest.raises(InvalidArgument, match=message):
        getattr(mpq, call)(validate=validate, **more)


def test_few_samples_one_a_batch_validate_nothing(mpq, train, data):
    mpq.train_indicators(train, steps=0)
    found = mpq.search(bitops="W4A4", validate=list(data.tensors[0][:3].split(1)))
    assert found.validation.verdict == "only 2 samples are held out, and at least 16 are needed"


def test_the_solver_takes_nothing_of_the_time_to_measure(mpq, train, val, monkeypatch):
    from hub_mpq.search import validated_search

    mpq.train_indicators(train, steps=0)
    solve, solved = validated_search.search_policy, []

    def slow(*args, **kwargs):
        time.sleep(1.5)
        solved.append(1)
        return solve(*args, **kwargs)

    monkeypatch.setattr(validated_search, "search_policy", slow)
    found = mpq.search(bitops="W4A4", validate=val, validate_seconds=1.5)
    assert found.validation.done
    assert found.validation.seconds < 1.5
    assert solved == [1]


def test_of_a_front_each_point_tells_its_own_seconds(mpq, train, val):
    mpq.train_indicators(train, steps=0)
    began = time.perf_counter()
    front = mpq.pareto(points=4, validate=val)
    assert len(front) > 2
    spent = [point.validation.seconds for point in front]
    assert sum(spent) <= time.perf_counter() - began
    assert mpq.seconds["validate"] == pytest.approx(sum(spent))


def test_one_sample_is_an_error_of_validate_and_none_of_val(mpq, train, data):
    with pytest.raises(InvalidArgument, match="at least two samples"):
        mpq.quantize(bitops="W4A4", train=train, validate=[X[:1]], **UNTRAINED)
    mpq.quantize(bitops="W4A4", train=train, val=[X[:1]], **UNTRAINED)
    assert not mpq.result.validation.done


def test_without_training_data_norms_are_measured_as_they_are(mpq, train, val):
    scores = mpq.train_indicators(train, steps=0)
    mpq.quantize(bitops="W4A4", val=val, indicators=scores)
    x = torch.cat([batch for batch, _ in val])
    float_logits = mpq.float_model(x).log_softmax(-1)
    for row in mpq.result.measurements:
        quantized = mpq.apply_policy(row.policy).model
        with torch.no_grad():
            kl = (float_logits.exp() * (float_logits - quantized(x).log_softmax(-1))).sum(-1)
        assert row.divergence == pytest.approx(float(kl.mean()), abs=6 * row.standard_error)
