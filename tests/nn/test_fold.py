"""Weights that a layer computes at each call become plain weights: the float function stays the same."""

import copy
import warnings

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_hook
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from hub_mpq import HubMPQ
from hub_mpq.adapters.restore_state import copied_structure
from hub_mpq.errors import HubMPQError, PackedFormat
from hub_mpq.nn.expose import expose_layers, names_of_parameters
from hub_mpq.nn.fold import fold_layers, folded_layers, has_layers_to_fold, unfold_layers, unfolded_state
from hub_mpq.nn.types import layer_kind


def weight_hook(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, **options)


def trained(conv):
    """With a gain that is not one."""
    if hasattr(conv, "gain"):
        nn.init.uniform_(conv.gain, 0.5, 2)
    return conv


MADE = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2),
    "weight norm of rows": lambda: parametrizations.weight_norm(nn.Linear(9, 5)),
    "weight norm of all": lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, bias=False), dim=None),
    "weight norm of a transposed one": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3, stride=2)),
    "weight norm by a hook": lambda: weight_hook(nn.Conv1d(4, 6, 3), dim=2),
    "weight norm of all by a hook": lambda: weight_hook(nn.ConvTranspose1d(4, 6, 3), dim=None),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 6, 3)),
    "spectral norm by a hook": lambda: spectral_hook(nn.Conv1d(4, 6, 3)),
    "StdConv2d": lambda: StdConv2d(3, 6, 3, stride=2),
    "StdConv2dSame": lambda: StdConv2dSame(3, 6, 3, stride=2, bias=True),
    "StdConv2dSame that pads evenly": lambda: StdConv2dSame(3, 6, 3),
    "ScaledStdConv2d": lambda: trained(ScaledStdConv2d(4, 6, 3, groups=2, gamma=1.7)),
    "ScaledStdConv2dSame": lambda: trained(ScaledStdConv2dSame(4, 6, 2, stride=2, dilation=1)),
    "WeightStandardizedConv2d": lambda: WeightStandardizedConv2d(3, 6, 3, stride=2, padding="SAME"),
    "WeightStandardizedConv2d without SAME": lambda: WeightStandardizedConv2d(3, 6, 3, padding=None, eps=1e-2),
}


def form(name):
    first, *rest = name.split()
    return f"{first}_norm" if rest[:1] == ["norm"] else first


def case(name):
    """(a net of one such layer, an input)."""
    torch.manual_seed(0)
    layer = MADE[name]()
    if isinstance(layer, nn.Linear):
        x = torch.randn(2, 4, layer.in_features)
    else:
        x = torch.randn(2, layer.in_channels, *(9, 8)[: len(layer.kernel_size)])
    return nn.Sequential(layer).eval(), x


@pytest.mark.parametrize("name", MADE)
def test_the_function_stays(name):
    net, x = case(name)
    want = net(x)
    assert has_layers_to_fold(net)
    fold_layers(net)
    assert not has_layers_to_fold(net)
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)
    layer = net[0]
    assert layer_kind(layer) is not None
    assert type(layer) in (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d, Conv2dSame)
    assert list(layer.state_dict()) == (["weight"] if layer.bias is None else ["weight", "bias"])
    assert layer.weight.requires_grad
    assert [what.form for _, _, what in folded_layers(net)] == [form(name)]
    net.train()(x).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("name", MADE)
def test_shapes_alone_are_folded_on_meta(name):
    net, _ = case(name)
    with torch.device("meta"):
        skeleton = nn.Sequential(MADE[name]())
    fold_layers(skeleton)
    fold_layers(net)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert all(v.is_meta for v in skeleton.state_dict().values())


@pytest.mark.parametrize("name", MADE)
def test_a_copy_of_the_structure_leaves_the_model_alone(name):
    net, x = case(name)
    net.train()
    before, want = {k: v.clone() for k, v in net.state_dict().items()}, net.eval()(x)
    expose_layers(copied_structure(net))
    net.train()
    fold_layers(copied_structure(net))
    assert net.training
    assert {k: v.tolist() for k, v in net.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
    assert torch.equal(net.eval()(x), want)
    assert has_layers_to_fold(net)


@pytest.mark.parametrize("name", MADE)
def test_the_users_network_is_quantized_packed_and_loaded(name, tmp_path):
    net, x = case(name)
    keys = list(net.state_dict())
    want = net(x)
    mpq = HubMPQ.from_module(net, x)
    torch.testing.assert_close(mpq.model(x), want, rtol=1e-6, atol=1e-6)
    assert [layer.name for layer in mpq.graph] == ["0"]
    mpq.apply_policy("W5A8", [(x,)])
    assert f"folded: weights of 1 layer computed once ({form(name)})" in mpq.report()
    mpq.save_pretrained(tmp_path)
    other, _ = case(name)
    again = HubMPQ.from_pretrained(tmp_path, module=other)
    assert torch.equal(again.model(x), mpq.model(x))
    assert list(net.state_dict()) == keys
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("name", MADE)
def test_float_weights_go_back_where_that_can_be(name):
    net, x = case(name)
    keys = set(net.state_dict())
    fold_layers(net)
    with torch.no_grad():
        net[0].weight.copy_((net[0].weight * 4).round() / 4 + 0.01)  # as a quantizer would leave it
    want = net(x)
    if not name.startswith("weight norm"):
        with pytest.raises(HubMPQError, match="cannot be written as float weights of Sequential"):
            names_of_parameters(net, net.state_dict())
        with pytest.warns(UserWarning, match="do not load this state dict into another"):
            unfold_layers(net)
        assert torch.equal(net(x), want)
        return
    state = names_of_parameters(net, net.state_dict())
    assert set(state) == keys
    fresh, _ = case(name)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), want, rtol=1e-6, atol=1e-6)
    unfold_layers(net)
    assert set(net.state_dict()) == keys
    torch.testing.assert_close(net(x), want, rtol=1e-6, atol=1e-6)
    assert has_layers_to_fold(net)


def test_what_is_not_known_stays():
    """Other parametrizations, of other tensors or of other layers."""

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    class Mine(nn.Linear):
        pass

    kept = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.LSTM(3, 4), "weight_ih_l0"),
        weight_hook(nn.Linear(3, 4), name="bias", dim=None),
        parametrizations.weight_norm(Mine(3, 4)),
    )
    both = parametrizations.weight_norm(nn.Linear(3, 4))
    nn.utils.parametrize.register_parametrization(both, "weight", Twice())
    kept.append(both)
    before = [type(module) for module in kept.modules()]
    assert not has_layers_to_fold(kept)
    fold_layers(kept)
    assert [type(module) for module in kept.modules()] == before


def test_a_layer_under_two_names_is_folded_once():
    net = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 3))})
    net["b"] = net["a"]
    fold_layers(net)
    assert net["a"] is net["b"]
    assert type(net["a"]) is nn.Linear


def test_a_file_of_before_is_refused(tmp_path, monkeypatch):
    """Its standardised convolution stayed float under the same name, and would be taken for the folded weight."""
    from hub_mpq.nn import expose

    torch.manual_seed(0)

    def net():
        return nn.Sequential(StdConv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 25, 2)).eval()

    x = torch.randn(2, 3, 5, 5)
    with monkeypatch.context() as m:
        m.setattr(expose, "has_layers_to_fold", lambda _: False)
        m.setattr(expose, "fold_layers", lambda _: None)
        mpq = HubMPQ.from_module(net(), x)
        mpq.apply_policy("W5A8", [(x,)])
        mpq.save_pretrained(tmp_path)
        assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net()).model(x), mpq.model(x))
    with pytest.raises(PackedFormat, match="'0' was saved before weights were folded"):
        HubMPQ.from_pretrained(tmp_path, module=net())


@pytest.mark.parametrize("form", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_slice_of_zeros_stays_zeros(form):
    """Few bits round a slice of small weights to zeros, whose norm nothing can be divided by."""
    net = nn.Sequential(form(nn.Conv1d(4, 6, 3), dim=2))
    fold_layers(net)
    with torch.no_grad():
        net[0].weight[..., 1] = 0
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    wanted = net(x).detach()
    state = unfolded_state(net, net.state_dict())
    other = nn.Sequential(form(nn.Conv1d(4, 6, 3), dim=2))
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), wanted)
    unfold_layers(net)
    torch.testing.assert_close(net(x), wanted)
    assert net.state_dict().keys() == other.state_dict().keys()
