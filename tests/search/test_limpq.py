import copy
import random

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import Candidates
from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers import LSQ
from hub_mpq.search.limpq import LIMPQ
from hub_mpq.search.movement import movement, rank_correlation
from hub_mpq.search.sensitivity import like
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def attached(net, **options):
    mpq = HubMPQ.from_module(net, X)
    loss = Finetune(task=Classification(), lr=1e-3, scale_lr=1e-2, weight_decay=0.0, smoothing=0.0)
    strategy = LIMPQ(**options)
    strategy.loss = loss
    model = copy.deepcopy(net)
    candidates = {x.name: Candidates((2, 3, 5), (2, 3, 5)) for x in mpq.graph.searched}
    strategy.attach(model, mpq.graph, candidates, {"4": "3", "7": "6"})
    return strategy, model


def test_a_step_is_one_pass_a_width_and_one_at_random(net, train):
    strategy, model = attached(net)
    assert strategy.passes == 4
    seen = []
    for _ in strategy.losses(model, next(iter(train)), random.Random("0:0")):
        seen.append([module.weight_quantizer.spec.num_bits for module in strategy.layers.values()])
        banks = [model[4].bank, model[7].bank]
        assert banks == [strategy.widths.index(b) for b in seen[-1][:2]]
    assert seen[:3] == [[2] * 3, [3] * 3, [5] * 3]
    again = [
        [module.weight_quantizer.spec.num_bits for module in strategy.layers.values()]
        for _ in strategy.losses(model, next(iter(train)), random.Random("0:0"))
    ]
    assert again[3] == seen[3], "the same seed and step draw the same widths"


def test_fixed_layers_stay_float_and_frozen_weights_do_not_learn(net):
    strategy, model = attached(net, freeze_weights=True)
    assert set(strategy.layers) == {"3", "6", "9"}
    assert type(model[0]) is nn.Conv2d
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not learning & {"3.weight", "6.weight", "9.weight", "3.bias"}
    assert {"3.weight_quantizer.shift", "4.weight_bank"} <= learning


def test_unknown_indicator():
    with pytest.raises(InvalidArgument, match="indicator"):
        LIMPQ(indicator="size")
    with pytest.raises(InvalidArgument, match="granularity"):
        LIMPQ(granularity="row")


@pytest.mark.parametrize(
    ("options", "channels"),
    [({}, True), ({"granularity": "tensor"}, False), ({"indicator": "scale", "granularity": "channel"}, True)],
)
def test_granularity_of_the_weight_scales(net, options, channels):
    strategy, _ = attached(net, **options)
    counts = {q.base.shape[1] for q in (m.weight_quantizer for m in strategy.layers.values())}
    assert (counts != {1}) is channels


def test_what_a_batchnorm_removes_is_no_error(net, train):
    """Channels' shift and scale go, another pattern stays; only layers that a BatchNorm reads are forgiven."""
    y = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(like(y * torch.tensor([2.0, 0.5, 1.0])[:, None, None] - 3, y), y)
    assert (like(y.flip(0), y) - y).abs().max() > 1
    batches = list(train)[:2]
    bare = copy.deepcopy(net)
    bare[4] = nn.Identity()
    with torch.no_grad():
        bare[3].weight.mul_((net[4].weight / (net[4].running_var + net[4].eps).sqrt()).view(-1, 1, 1, 1))
        bare[3].bias.sub_(net[4].running_mean).mul_(net[4].weight / (net[4].running_var + net[4].eps).sqrt())
        bare[3].bias.add_(net[4].bias)
    torch.testing.assert_close(bare.eval()(batches[0][0]), net.eval()(batches[0][0]), rtol=1e-3, atol=1e-3)
    normed = HubMPQ.from_module(net, X).train_indicators(batches, steps=0).weight["3"]
    folded = HubMPQ.from_module(bare, X).train_indicators(batches, steps=0).weight["3"]
    assert normed[2] < folded[2]


def test_the_unit_of_a_weight_changes_its_scale_but_not_the_divergence(net, train):
    """A convolution's weight times 10 before a BatchNorm is the same network: only the scale-free indicator says so."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[3].weight.mul_(10)
        twin[3].bias.mul_(10)
        twin[4].running_mean.mul_(10)
        twin[4].running_var.mul_(100)
    batches = list(train)[:2]
    torch.testing.assert_close(twin(batches[0][0]), net(batches[0][0]), rtol=1e-3, atol=1e-3)
    found = {}
    for kind in ("divergence", "scale", "raw scale"):
        for name, model in (("net", net), ("twin", twin)):
            indicators = HubMPQ.from_module(model, X).train_indicators(batches, steps=0, indicator=kind)
            found[kind, name] = indicators.weight["3"][4]
    assert found["divergence", "twin"] == pytest.approx(
        found["divergence", "net"], rel=0.02
    )  # eps of the norm does not scale
    assert found["scale", "twin"] == pytest.approx(found["scale", "net"], rel=1e-3)
    assert found["raw scale", "twin"] == pytest.approx(10 * found["raw scale", "net"], rel=1e-3)


def test_divergence_falls_with_the_width_and_alpha_is_one(net, train):
    mpq = HubMPQ.from_module(net, X)
    indicators = mpq.train_indicators(train, steps=4)
    for row in (*indicators.weight.values(), *indicators.activation.values()):
        assert row[2] > row[4] > row[6]
    assert mpq.score_table()[1] == 1.0
    mpq.train_indicators(train, steps=2, indicator="raw scale")
    assert mpq.score_table()[1] != 1.0


def test_movement_reports_what_happened():
    start = {"a": {2: 1.0}, "b": {2: 2.0}, "c": {2: 3.0}}
    assert movement(start, start)["rank_correlation"] == 1.0
    turned = movement(start, {"a": {2: 3.0}, "b": {2: 2.0}, "c": {2: 1.0}})
    assert turned["rank_correlation"] == pytest.approx(-1.0)
    assert turned["largest_change"] == pytest.approx(2.0)
    assert movement({}, {}) == {}
    import numpy as np

    assert rank_correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 1.0


def test_scales_are_one_parameter_a_quantizer(net):
    strategy, model = attached(net)
    shifts = [m.shift for m in model.modules() if isinstance(m, LSQ)]
    assert len(shifts) == 6
    assert strategy.parameter_groups(model)[-1]["lr"] == 1e-2


class Residual(nn.Module):
    """Adds to a layer's output, in place or not."""

    def __init__(self, *, inplace):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.inplace = inplace

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.a(x)
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.head(torch.nn.functional.silu(self.b(y), inplace=self.inplace))


def test_what_follows_a_layer_in_place_does_not_change_its_indicator():
    plain, inplace = Residual(inplace=False), Residual(inplace=True)
    inplace.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(3)]
    found = [
        HubMPQ.from_module(model.eval(), torch.zeros(1, 6)).train_indicators(data, steps=0).weight
        for model in (plain, inplace)
    ]
    for name, row in found[0].items():
        assert found[1][name] == pytest.approx(row, rel=1e-4)


def test_frozen_weights_are_scored_like_others(net, train):
    mpq = HubMPQ.from_module(net, X, fixed={"*": None})
    frozen = mpq.train_indicators(train, steps=1, freeze_weights=True)
    assert min(row[2] for row in frozen.weight.values()) > 1e-12
