"""The estimated divergence of the output when one operand of one layer is quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ, Indicators
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights, widths_off
from hub_mpq.nn.quantize import quantize_with_lsq, quantized_layers
from hub_mpq.search.scores import default_alpha
from hub_mpq.search.sensitivity import LEAST, SAMPLES, at, monotone, sensitivity
from hub_mpq.tasks import Classification, Regression, TokenClassification, task_of


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
