"""Weights and modules that a network holds more than once, and layers that compute more than their weight."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.errors import InvalidArgument
from hub_mpq.nn.packing import predicted_nbytes


class Tied(nn.Module):
    """Two layers with one weight, whose output channels lie along another axis in each."""

    def __init__(self, first, second, axes):
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Linear(6, 6), first, second, nn.Linear(axes, 2)
        second.weight = first.weight

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x)).relu()).flatten(1).sort(1)[0][:, : self.head.in_features])


PAIRS = {
    "decoder of an autoencoder": (lambda: (nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3)), (4, 6)),
    "transposed one first": (lambda: (nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3)), (4, 6, 6)),
    "GPT-2's linear layer": (lambda: (nn.Linear(6, 6), Conv1D(6, 6)), (4, 6)),
}


def tied(name):
    torch.manual_seed(0)
    make, shape = PAIRS[name]
    return Tied(*make(), 4).eval(), torch.randn(3, *shape)


@pytest.mark.parametrize("name", PAIRS)
def test_a_weight_of_layers_with_other_axes_stays_float_and_is_loaded(name, tmp_path):
    net, x = tied(name)
    mpq = HubMPQ.from_module(net, x)
    assert mpq.graph.names == ("stem", "head")
    kept = {op.name: op.reason for op in mpq.graph.floats if op.name in ("first", "second")}
    assert set(kept.values()) == {"its weight is used outside its own forward"}
    mpq.apply_policy("W3A5", [x])
    mpq.save_pretrained(tmp_path)
    again = HubMPQ.from_pretrained(tmp_path, module=tied(name)[0])
    with torch.no_grad():
        assert torch.equal(again(x), mpq(x))


class Twice(nn.Module):
    """One attention under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.b = self.a

    def forward(self, x):
        x = self.stem(x)
        x = self.a(x, x, x)[0]
        return self.head(self.b(x, x, x)[0])


@pytest.mark.parametrize("exclude", [(), ("a.k_proj",), ("a.*",)])
def test_attention_under_two_names_is_packed_once_and_of_the_predicted_size(tmp_path, exclude):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    mpq = HubMPQ.from_module(Twice().eval(), x, exclude=exclude)
    mpq.apply_policy("W4A8", [x])
    size = mpq.save_pretrained(tmp_path)
    assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == size == mpq.usage().amounts["size"]
    with torch.no_grad():
        assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=Twice())(x), mpq(x))


def hooked(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, **options)


def test_a_folded_model_is_pickled():
    torch.manual_seed(0)
    net, x = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), nn.Conv1d(6, 2, 3)), torch.randn(2, 4, 9)
    mpq = HubMPQ.from_module(net.eval(), x)
    mpq.apply_policy("W4A8", [x])
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(mpq.model))(x), mpq.model(x))  # noqa: S301


def biased(seed):
    torch.manual_seed(seed)
    layer = hooked(hooked(nn.Conv1d(4, 6, 3)), name="bias", dim=None)
    return nn.Sequential(layer, nn.ReLU(), nn.Conv1d(6, 2, 3)).eval()


def test_a_layer_that_computes_its_bias_too_is_loaded_to_the_bit(tmp_path):
    x = torch.randn(2, 4, 9)
    mpq = HubMPQ.from_module(biased(0), x)
    mpq.apply_policy("W4A8", [x])
    mpq.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=biased(1))(x), mpq(x))


def test_attention_that_shares_its_weight_says_why_it_stays_float():
    torch.manual_seed(0)
    net = Twice().eval()
    net.b = nn.MultiheadAttention(8, 2, batch_first=True)
    net.b.in_proj_weight = net.a.in_proj_weight
    graph = HubMPQ.from_module(net, torch.randn(3, 5, 6)).graph
    (reason,) = {op.reason for op in graph.floats if op.name in ("a", "b") and op.weight_count}
    assert reason == "its query, key and value weights are shared with another module or recomputed at each call"


class TiedHead(nn.Module):
    """An embedding (or a stem) that shares its weight with a layer which is not the last."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Embedding(8, 8) if kind == "embedding" else nn.Linear(8, 8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize("kind", ["embedding", "stem"])
def test_what_shares_a_weight_with_a_fixed_layer_is_fixed_with_it(kind, tmp_path):
    torch.manual_seed(0)
    net, x = TiedHead(kind).eval(), torch.arange(8)[None] if kind == "embedding" else torch.randn(2, 8)
    mpq = HubMPQ.from_module(net, x)
    assert [str(layer.fixed) for layer in mpq.graph] == ["W8A32" if kind == "embedding" else "W8A8", "W8A8", "W8A8"]
    mpq.apply_policy("W3A4", [x])
    mpq.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=TiedHead(kind))(x), mpq(x))


def test_a_policy_with_two_widths_of_one_weight_is_refused():
    net, x = TiedHead("stem").eval(), torch.randn(2, 8)
    mpq = HubMPQ.from_module(net, x, fixed={"*": None})
    levels = zip(mpq.graph.names, ("W8A8", "W4A8", "W8A8"), strict=True)
    policy = Policy({name: LayerBits.parse(level) for name, level in levels}, mpq.graph.digest)
    with pytest.raises(InvalidArgument, match="share one weight"):
        mpq.apply_policy(policy, [x])
