"""A weight that is read outside its layer's forward: the layer stays float, and all forms are one network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hub_mpq import HubMPQ
from hub_mpq.adapters import trace
from hub_mpq.core.library import libraries
from hub_mpq.errors import InvalidArgument
from hub_mpq.export.float_copy import float_copy_state

REASON = "its weight is used outside its own forward"
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def on_meta(net):
    with torch.device("meta"):
        return net().eval()


class Base(nn.Module):
    """Two layers; children say what else is done with the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.after = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(F.relu(self.use(F.relu(self.second(F.relu(self.first(x)))))))


class Transposed(Base):
    def use(self, x):
        return x @ self.first.weight.t()


class Functional(Base):
    def use(self, x):
        return F.linear(x[:, :2], self.first.weight[:, :2])


class InAnother(Base):
    """A weight that is made from it, like the head of MobileBERT."""

    def use(self, x):
        return x @ torch.cat([self.first.weight.t(), self.first.weight], dim=1)[:, :4]


class Changed(Base):
    def use(self, x):
        self.first.weight.data.clamp_(-0.1, 0.1)
        return x


class Penalty(Base):
    """Not a product at all."""

    def use(self, x):
        return x * self.first.weight.abs().mean()


class ForwardAlone(Base):
    """Hooks do not see this call."""

    def use(self, x):
        return self.first.forward(x)


class Reader(nn.Module):
    """A layer of another type that holds the same Parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * self.weight.sum(1)


class Shared(Base):
    def __init__(self):
        super().__init__()
        self.reader = Reader(self.first.weight)

    def use(self, x):
        return self.reader(x)


USES = [Transposed, Functional, InAnother, Changed, Penalty, ForwardAlone, Shared]


class ShapeOnly(Base):
    def use(self, x):
        w = self.first.weight
        return x.to(w.dtype).to(w.device) * w.shape[0] + w.new_zeros(4) + torch.zeros_like(w)[0] + w.t().size(0)


class SharedLayers(Base):
    """Two layers with one Parameter, both called: a tied head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight

    def use(self, x):
        return self.head(x)


class ReadsValues(Shared):
    """Cannot run on meta tensors."""

    def use(self, x):
        return x @ self.first.weight if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("net", [*USES, ReadsValues])
def test_it_stays_float_and_says_why(net):
    for model in (net().eval(), on_meta(net)):
        layers, floats = trace(model, X[:1])
        assert [layer.name for layer in layers] == ["second", "after"]
        kept = [op for op in floats if op.name == "first"]
        assert [(op.weight_count, op.reason) for op in kept] == [(16, REASON)]


@pytest.mark.parametrize("net", [ShapeOnly, SharedLayers])
def test_what_reads_no_values_or_is_a_layer_too_leaves_it_quantized(net):
    for model in (net().eval(), on_meta(net)):
        layers, floats = trace(model, X[:1])
        assert {"first", "second", "after"} <= {layer.name for layer in layers}
        assert not floats


def test_layers_that_share_the_weight_stay_float_with_it():
    class Both(SharedLayers):
        def use(self, x):
            return self.head(x) @ self.head.weight

    layers, floats = trace(Both().eval(), X[:1])
    assert [layer.name for layer in layers] == ["second", "after"]
    kept = {op.name: op.weight_count for op in floats}
    assert kept["first"] + kept["head"] == 16


def in_one_buffer(net: nn.Module) -> nn.Module:
    """The net with Parameters that are views of one buffer."""
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(flat, net.parameters())
    return net


def looking_at_values(net: type[Base]) -> nn.Module:
    """A net that cannot run on meta tensors."""

    class Values(net):
        def use(self, x):
            return super().use(x) if float(x.sum()) > -1e9 else -x

    return Values().eval()


class Nothing(Base):
    def use(self, x):
        return x


def test_parameters_that_are_views_of_one_buffer_are_not_mistaken_for_each_other():
    for net in (Nothing, ShapeOnly):
        layers, floats = trace(in_one_buffer(looking_at_values(net)), X[:1])
        assert [layer.name for layer in layers] == ["first", "second", "after"]
        assert [layer.macs for layer in layers] == [16, 16, 12]
        assert not floats


@pytest.mark.parametrize("net", USES)
def test_a_use_of_a_parameter_that_is_a_view_of_a_buffer_is_seen(net):
    layers, floats = trace(in_one_buffer(looking_at_values(net)), X[:1])
    assert [layer.name for layer in layers] == ["second", "after"]
    assert [(op.weight_count, op.reason) for op in floats if op.name == "first"] == [(16, REASON)]


def test_a_use_of_the_whole_buffer_is_one_of_all_its_views():
    class Whole(Base):
        def use(self, x):
            return x * self.flat.mean() if float(x.sum()) > -1e9 else x

    net = Whole().eval()
    net.flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(net.flat, net.parameters())
    layers, floats = trace(net, X[:1])
    assert not layers
    assert {op.name: op.weight_count for op in floats} == {"first": 16, "second": 16, "after": 12}


@pytest.mark.parametrize("net", USES)
def test_every_form_is_one_network(net, tmp_path):
    model = net().eval()
    mpq = HubMPQ.from_module(model, X[:1], fixed={"*": None}, weight_only=True).apply_policy("W2A32", [X])
    with torch.no_grad():
        want = mpq.model(X)
        mpq.save_pretrained(tmp_path)
        assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net()).model(X), want)
        copied = net().eval()
        copied.load_state_dict(float_copy_state(mpq.model, libraries.get("module")))
        assert torch.allclose(copied(X), want, atol=1e-6)
        assert not torch.allclose(model(X), want, atol=1e-3)


def test_pinning_it_says_why_it_stays_float():
    with pytest.raises(InvalidArgument, match=f"'first' stays float: {REASON}"):
        HubMPQ.from_module(Transposed(), X[:1], fixed={"first": "W8A8"})


def test_a_functional_head_is_one_network_in_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime

    mpq = HubMPQ.from_module(Transposed().eval(), X[:1], fixed={"*": None}).apply_policy("W7A8", [X])
    mpq.export(tmp_path, "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), mpq.model(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_modules_of_torchscript_are_read_too():
    net = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), X)
    layers, floats = trace(net, X[:1])
    assert not layers
    assert [op.reason for op in floats if op.weight_count] == ["no quantized form of TracedModule is known"]
