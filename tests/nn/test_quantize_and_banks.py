import copy

import pytest
import torch
from torch import nn

from hub_mpq import adapters
from hub_mpq.core import Policy
from hub_mpq.errors import PolicyMismatch, UnsupportedLayer
from hub_mpq.nn.banks import add_banks, select_bank
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs, widths_off
from hub_mpq.nn.quantize import quantize_layer, quantize_to_policy, quantize_with_lsq, quantized_layers
from hub_mpq.quantizers import LSQ
from hub_mpq.tasks import Embedding

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def graph_of(net):
    return adapters.from_module(net, X[:1]).graph


def test_quantizers_that_let_through_leave_the_model_as_it_was(net):
    want = net(X)
    quantize_to_policy(net, graph_of(net), Policy.uniform(graph_of(net), "W4A4"))
    with widths_off(net):
        assert torch.equal(net(X), want)
    assert not torch.equal(net(X), want)


def test_parameters_are_the_same_objects_under_the_same_names(net):
    before = dict(net.named_parameters())
    quantize_to_policy(net, graph_of(net), Policy.uniform(graph_of(net), "W4A4"))
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_uniform_8_bits_is_close_and_2_bits_is_not(net):
    graph, errors = graph_of(net), {}
    for level in ("W8A8", "W4A4", "W2A2"):
        model = copy.deepcopy(net)
        quantize_to_policy(model, graph, Policy.uniform(graph, level))
        calibrate_weights(model, mse=True)
        calibrate_inputs(model, sample_inputs(model, [X], Embedding().forward), mse=True)
        errors[level] = (model(X) - net(X)).norm() / net(X).norm()
    assert errors["W8A8"] < errors["W4A4"] / 4
    assert errors["W4A4"] < errors["W2A2"] / 2


def test_same_padding_of_timm_is_kept():
    from timm.layers import Conv2dSame

    for size, stride, dilation in [(7, 2, 1), (8, 2, 1), (9, 3, 2), (8, 1, 1)]:
        conv = Conv2dSame(3, 6, 3, stride=stride, dilation=dilation, groups=3)
        x = torch.randn(2, 3, size, size + 1)
        quant = quantize_layer(conv, "c", LSQ((4,), signed=True), None)
        quant.weight_quantizer.set_width(None)
        assert torch.equal(quant(x), conv(x))


def test_dispatch_is_on_the_exact_type():
    from timm.layers import StdConv2d

    with pytest.raises(UnsupportedLayer, match="StdConv2d"):
        quantize_layer(StdConv2d(3, 4, 3), "stem", LSQ((4,), signed=True), None)


def test_conv1d_and_embedding():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4)
    q = LSQ((8,), signed=True, channels=6, axis=1)
    quant = quantize_layer(layer, "c", q, None)
    quant.weight_quantizer.set_width(None)
    torch.testing.assert_close(quant(x), layer(x))
    table = nn.Embedding(10, 4, padding_idx=0)
    quant = quantize_layer(table, "e", LSQ((4,), signed=True, channels=10), None)
    quant.weight_quantizer.set_width(None)
    ids = torch.tensor([[0, 3, 9]])
    assert torch.equal(quant(ids), table(ids))


def test_names_the_graph_lacks_are_refused(net):
    with pytest.raises(PolicyMismatch, match="nothing"):
        quantize_with_lsq(net, graph_of(net), {"nothing": ((4,), (4,))}, per_channel=True)


def test_banks_keep_their_own_statistics_and_parameters(net):
    names = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    want = net(X)
    add_banks(net, names, 3)
    assert torch.equal(net(X), want)
    net.train()
    for name in names:
        select_bank(net, name, 1)
    net(X * 3).sum().backward()
    norm = net[1]
    assert torch.equal(norm.running_mean_bank[0], norm.running_mean_bank[2])
    assert not torch.equal(norm.running_mean_bank[0], norm.running_mean_bank[1])
    assert norm.weight_bank.grad[1].abs().sum() > 0
    assert norm.weight_bank.grad[0].abs().sum() == 0
    assert copy.deepcopy(net)[1].bank == 1


def test_banks_of_timms_norm_keep_its_activation():
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3, act_layer=nn.ReLU).eval()
    holder = nn.Sequential(norm)
    x = torch.randn(2, 3, 4, 4)
    want = norm(x)
    add_banks(holder, ["0"], 2)
    assert torch.equal(holder(x), want)
    assert holder(x).min() == 0


def test_a_shared_weight_has_one_quantizer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.body(self.table(ids)))

    net = Tied()
    graph = adapters.from_module(net, torch.tensor([[1, 2]])).graph
    quantize_to_policy(net, graph, Policy.uniform(graph, "W4A4"))
    layers = dict(quantized_layers(net))
    assert layers["head"].weight_quantizer is layers["table"].weight_quantizer
    assert layers["head"].weight is layers["table"].weight
