"""The estimated divergence of the output when one operand of one layer is quantized."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ, Indicators, Policy
from hub_mpq.errors import InvalidArgument
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs, widths_off
from hub_mpq.nn.quantize import quantize_with_lsq, quantized_layers
from hub_mpq.search.scores import default_alpha, expected_divergence
from hub_mpq.search.sensitivity import LEAST, POSITIONS, SAMPLES, at, like, monotone, sensitivity
from hub_mpq.tasks import Classification, MultiLabel, Regression, TokenClassification, task_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(widths=(4, 6, 8), positions=None):
    """One linear layer with quantizers, its float twin, and inputs."""
    net = nn.Sequential(nn.Linear(12, 5))
    with torch.no_grad():
        net[0].weight.copy_(draw(5, 12, seed=1) / 3)
        net[0].bias.zero_()
    twin = copy.deepcopy(net)
    graph = HubMPQ.from_module(nn.Sequential(net[0], nn.Linear(5, 2)), torch.zeros(1, 12), fixed={"0": None}).graph
    quantize_with_lsq(net, graph, {"0": (widths, widths)}, per_channel=True)
    x = draw(512, *([positions] if positions else []), 12, seed=2)
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, {"0": x.flatten()}, mse=True)
    return net.eval(), twin, x


def found(net, x, task, seed=0):
    with widths_off(net):
        return sensitivity(dict(quantized_layers(net)), net, list(x.split(64)), task, seed=seed)


@pytest.mark.parametrize("task", [Classification(), Regression(), TokenClassification()], ids=lambda t: t.name)
def test_it_is_the_divergence_that_quantizing_one_operand_causes(task):
    net, twin, x = linear(positions=3 if task.positional else None)
    task = task.bind(twin)
    estimate = found(net, x, task)
    with widths_off(net), torch.no_grad():
        for row, quantizer in (
            (estimate.weight["0"], net[0].weight_quantizer),
            (estimate.activation["0"], net[0].input_quantizer),
        ):
            for bits in (4, 6, 8):
                with at(quantizer, bits):
                    wanted = task.divergence(net(x), twin(x))[0].mean()
                assert row[bits] == pytest.approx(float(wanted), rel=0.2)
    assert estimate.unit == task.unit(twin(x))


def test_the_standard_error_is_the_spread_over_draws():
    net, twin, x = linear()
    task = task_of(Classification(), twin)
    runs = [found(net, x, task, seed=100 * i) for i in range(12)]
    for side in ("weight", "activation"):
        values = torch.tensor([getattr(run, side)["0"][4] for run in runs])
        told = torch.tensor([getattr(run, f"{side}_error")["0"][4] for run in runs]).mean()
        assert 0.4 < float(values.std() / told) < 2.2
    assert runs[0].relative_error()["0"] < 0.25


def test_labels_of_the_batch_do_not_matter_and_enough_is_enough():
    net, twin, x = linear()
    task = task_of(Classification(), twin)
    layers = dict(quantized_layers(net))
    batches = [(part, torch.full((64,), i % 5)) for i, part in enumerate(x.split(64))]
    with widths_off(net):
        one = sensitivity(layers, net, batches, task)
        two = sensitivity(layers, net, [*batches, (x[:64], torch.zeros(64).long())], task)
    assert one.weight == found(net, x, task).weight == two.weight
    assert len(x) == SAMPLES


def test_windows_of_one_sample_are_one_sample():
    """A layer that sees each sample in four parts has the sensitivity of one that sees it whole."""

    class Parts(nn.Module):
        def __init__(self, layer, parts):
            super().__init__()
            self.layer, self.parts = layer, parts

        def forward(self, x):
            return self.layer(x.reshape(len(x) * self.parts, -1, 12)).reshape(len(x), 4, -1).mean(1)

    net, twin, _ = linear()
    task, x = task_of(Classification(), twin), draw(512, 4, 12, seed=4)
    whole, parts = (found(Parts(net[0], n), x, task).weight["layer"] for n in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_monotone():
    assert monotone({2: 1.0, 3: 0.2, 4: 0.5, 8: 0.0}) == {2: 1.0, 3: 0.5, 4: 0.5, 8: LEAST}


def test_units_of_files_that_were_written_before():
    def of(**provenance):
        return Indicators({"0": {2: 3.0}}, {"0": {2: 6.0}}, provenance=provenance)

    old = of(unit="squared change of the loss", indicator="loss")
    assert (old.unit, old.predicts, default_alpha(old)) == ("loss", False, 1)
    assert of(unit="scale of the quantizer").unit == "scale"
    assert [of(unit=unit).predicts for unit in ("kl", "target_error", "scale")] == [True, True, False]
    assert [default_alpha(of(unit=unit)) for unit in ("kl", "scale")] == [1, 2]


class Again(nn.Module):
    """A layer that runs four times in one forward."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        for _ in range(4):
            x = x + torch.tanh(self.layer(x))
        return self.last(x)


class PositionsFirst(nn.Module):
    """A layer that reads [positions, batch, values], as XLNet's and Longformer's do."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.layer(torch.tanh(self.first(x).transpose(0, 1)))
        return self.last(torch.tanh(x).mean(0))


class PositionsSecond(PositionsFirst):
    """The same network, whose layer reads [batch, positions, values]."""

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))).mean(1))


def searched(net, x, dtype=torch.float32, seed=0):
    """The sensitivity of `net.layer`, and what quantizing its weight to 4 bits costs when measured."""
    net = net.to(dtype).eval()
    twin, batches = copy.deepcopy(net), [part.to(dtype) for part in x.split(16)]
    graph = HubMPQ.from_module(copy.deepcopy(net), batches[0][:1]).graph
    layers = quantize_with_lsq(net, graph, {"layer": ((4, 6), (4, 6))}, per_channel=True)
    task = task_of(Classification(), twin)
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, sample_inputs(net, batches, task.forward), mse=True)
    with widths_off(net), torch.no_grad():
        with torch.enable_grad():
            estimate = sensitivity(layers, net, batches, task, seed=seed)
        with at(net.layer.weight_quantizer, 4):
            rows = torch.cat([task.divergence(net(part), twin(part))[0] for part in batches])
    return estimate, float(rows.mean())


def test_errors_of_a_layer_that_runs_again_add_up_before_they_are_squared():
    torch.manual_seed(0)
    estimate, measured = searched(Again(), draw(512, 12))
    assert estimate.weight["layer"][4] == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("positions", [16, 20, 32], ids=["as many as samples", "other", "a multiple of the samples"])
def test_samples_may_lie_along_the_second_axis(positions):
    torch.manual_seed(0)
    net, second = PositionsFirst(), PositionsSecond()
    second.load_state_dict(net.state_dict())
    x = draw(256, positions, 12) + draw(256, 1, 12, seed=5)
    there, here = (searched(each, x)[0] for each in (net, second))
    assert there.weight["layer"] == pytest.approx(here.weight["layer"], rel=1e-3)
    assert there.activation_error["layer"] == pytest.approx(here.activation_error["layer"], rel=1e-3)


def test_squares_of_half_precision_do_not_vanish():
    torch.manual_seed(0)
    net = Again()
    with torch.no_grad():
        net.last.weight.mul_(0.02)  # gradients whose squares float16 can't hold
    whole, half = (searched(copy.deepcopy(net), draw(256, 12), dtype)[0] for dtype in (torch.float32, torch.float16))
    assert half.weight["layer"] == pytest.approx(whole.weight["layer"], rel=0.3)
    assert half.weight_error["layer"] == pytest.approx(whole.weight_error["layer"], rel=0.3)


def test_one_sample_has_no_standard_error():
    net, _, x = linear()
    assert found(net, x[:1], Classification()).relative_error() == {}
    assert found(net, 0 * x, Classification()).relative_error() == {}


def test_samples_bound_what_is_read_where_items_are_no_positions():
    net, _, x = linear()
    task = MultiLabel()
    net[0] = Many(net[0])
    with widths_off(net):
        layers = {"0": net[0].layer}
        one, two = (sensitivity(layers, net, list(x.split(64))[:n], task) for n in (2, 8))
    assert two.weight_error["0"][4] < 0.8 * one.weight_error["0"][4]


class Many(nn.Module):
    """Each value as 20 labels of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).repeat(1, 20)


def test_batches_without_an_item_are_refused():
    class Masked(TokenClassification):
        def mask(self, batch):
            return torch.zeros(batch.shape[:2], dtype=torch.bool)

    net, _, x = linear(positions=3)
    with pytest.raises(InvalidArgument, match="must keep at least one item"):
        found(net, x[:64], Masked())


def test_two_values_a_channel_keep_their_error():
    y = draw(2, 3)
    moved = y + draw(2, 3, seed=1)
    assert torch.equal(like(moved, y), moved)
    assert not torch.equal(like(draw(3, 3, seed=1), draw(3, 3)), draw(3, 3, seed=1))


def test_standard_errors_of_a_file_that_lies():
    errors = {"a": 0.1, "b": 10**400, "c": float("nan"), "d": -1.0, "e": "x", "f": True, "g": float("inf")}
    assert Indicators({}, {}, provenance={"standard_error": errors}).standard_error == {"a": 0.1}
    assert Indicators({}, {}, provenance={"standard_error": [1]}).standard_error == {}


class FirstPosition(PositionsSecond):
    """The result is read at the first position, as at a class token."""

    def forward(self, x):
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x))))[:, 0])


def test_a_class_token_does_not_move_the_samples_to_the_second_axis():
    torch.manual_seed(0)
    net, x = FirstPosition(), draw(256, 16, 12)
    one, other = (searched(copy.deepcopy(net), part)[0] for part in (x, x[:, :8]))
    assert one.weight_error["layer"][4] / one.weight["layer"][4] == pytest.approx(
        other.weight_error["layer"][4] / other.weight["layer"][4], rel=0.25
    )


def test_what_a_norm_removes_does_not_count():
    """Of one input value, a quantized weight moves the scale of each channel alone."""
    net = nn.Sequential(nn.Linear(1, 5)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.7], [-0.9], [1.1], [0.8], [-1.0]]))
    graph = HubMPQ.from_module(nn.Sequential(nn.Linear(1, 5), nn.Linear(5, 2)), draw(1, 1), fixed={"0": None}).graph
    quantize_with_lsq(net, graph, {"0": ((2, 4), (2, 4))}, per_channel=False)
    x = draw(64, 1)
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, {"0": x.flatten()}, mse=True)
    layers, task = dict(quantized_layers(net)), Classification()
    with widths_off(net):
        plain, normed = (sensitivity(layers, net, [x], task, names).weight["0"][4] for names in ((), ("0",)))
    assert normed < 1e-6 * plain


def test_positions_bound_what_is_read():
    net, _, x = linear(positions=3)
    long = x.repeat(1, POSITIONS // 3 // 64 + 1, 1)
    one, two = (found(net, part, TokenClassification()) for part in (long[:64], long))
    assert one.weight == two.weight


def test_a_run_whose_output_goes_nowhere_hides_no_other():
    class Idle(PositionsSecond):
        def forward(self, x):
            self.layer(torch.tanh(self.first(x)))
            return super().forward(x)

    torch.manual_seed(0)
    net, idle, x = PositionsSecond(), Idle(), draw(64, 4, 12)
    idle.load_state_dict(net.state_dict())
    assert searched(idle, x)[0].weight == searched(net, x)[0].weight


def test_the_report_tells_what_a_policy_is_expected_to_cost():
    mpq = HubMPQ.from_module(
        nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)), draw(1, 12), fixed={"*": None}
    )
    batches = [(draw(64, 12, seed=7), torch.arange(64) % 5)]
    mpq.train_scores(batches, steps=0, candidates=(2, 4))
    result = mpq.search(bitops="W4A4")
    mpq.apply_policy("W2A4", batches)
    found = expected_divergence(mpq.scores, mpq.graph, mpq.policy)
    assert found["0"][0] == mpq.scores.weight["0"][2] + mpq.scores.activation["0"][4]
    assert f"{found['0'][0]:.3g} ± {mpq.scores.standard_error['0']:.0%}" in mpq.report()
    whole = expected_divergence(mpq.scores, mpq.graph, result.policy)
    assert sum(value for value, _ in whole.values()) == pytest.approx(result.objective)
    assert not expected_divergence(mpq.scores, mpq.graph, Policy.uniform(mpq.graph, "W3A3"))  # no candidate
    for old in ("loss", "scale"):
        mpq.scores = replace(mpq.scores, provenance={"unit": old})
        assert "expected" not in mpq.report()
