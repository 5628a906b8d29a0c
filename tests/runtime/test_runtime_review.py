"""Networks that are easily computed otherwise than they are written, and what may be done to a built module."""

from __future__ import annotations

import copy

import pytest
import torch
from runtime_toys import noise, quantized, seen_data
from torch import Tensor, nn
from torch.nn import functional as F

import hub_mpq
from hub_mpq import HubMPQ
from hub_mpq.core import runtimes
from hub_mpq.errors import HubMPQError
from hub_mpq.runtime.in_process import _Engine

if runtimes.get("onednn").available() is not None:
    pytest.skip(f"onednn: {runtimes.get('onednn').available()}", allow_module_level=True)

IN_INTEGERS, IN_FLOAT = (0.0, 1.0), (1.0, 0.0)
MEASURED = _Engine._both_ways


@pytest.fixture(autouse=True)
def integers(monkeypatch):
    """Every layer that can computes in integers, but one called "plain", whatever is faster on this machine."""
    given = {"plain": IN_FLOAT}
    monkeypatch.setattr(_Engine, "_both_ways", lambda _, plan, __: given.get(plan.layer.name, IN_INTEGERS))


def check(net: nn.Module, x: Tensor | tuple[Tensor, ...], *others: Tensor) -> nn.Module:
    """The module of a network, built from one sample, after a comparison with the network."""
    inputs = x if isinstance(x, tuple) else (x,)
    one = tuple(t[:1] for t in inputs)
    mpq = HubMPQ.from_module(net.eval(), one).apply_policy("W7A8", [(inputs,)])
    module = mpq.to_runtime("onednn")
    for given in (inputs, *((other,) for other in others)):
        with torch.no_grad():
            want, found = mpq.model(*given), module(*given)
        assert found.shape == want.shape
        assert (found - want).norm() <= 0.01 * want.norm()
    return module


class Net(nn.Module):
    """Some layers, and a forward of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            else:
                self.add_module(name, layer)

    def forward(self, x):
        return self.compute(self, x)


def linear() -> nn.Module:
    return nn.Linear(8, 8)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_layer_that_runs_twice_takes_different_things_along():
    check(Net(lambda s, x: s.b(s.a(F.relu(s.a(x)))), a=linear(), b=linear()), noise(4, 8))
    check(Net(lambda s, x: s.a_0(F.relu(s.a(x))), a=nn.Sequential(linear()), a_0=linear()), noise(4, 8))


def test_an_activation_module_that_overwrites_twice():
    def forward(s, x):
        x = s.a(x)
        x = s.b(s.relu(x)) * 1.0
        return s.c(s.relu(x)) + x

    layers = {name: nn.Conv2d(3 if name == "a" else 8, 8, 1) for name in "abc"}
    assert hasattr(check(Net(forward, relu=nn.ReLU(inplace=True), **layers), noise(4, 3, 6, 6)), "graph")


def halves(s, x):
    y = s.a(x)
    F.relu(y.chunk(2, -1)[0], inplace=True)
    return s.b(y)


def slices(s, x):
    y = s.a(x)
    y[:, :4].mul_(3.0)
    return s.b(y)


def base(s, x):
    y = s.a(x)
    view = y.view(-1, 2, 4)
    y.mul_(2.0)
    return s.b(view.flatten(1))


@pytest.mark.parametrize("forward", [halves, slices, base])
def test_views_that_are_overwritten(forward):
    check(Net(forward, a=linear(), b=linear()), noise(16, 8))


def test_a_branch_on_a_type():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, mask):
            return self.a(x) * mask if isinstance(mask, Tensor) else self.a(x)

    check(Masked(), (noise(4, 8), noise(4, 8, seed=1)))


def test_a_norm_with_a_forward_of_its_own():
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x) + 1

    net = Net(lambda s, x: s.norm(s.a(x)), a=nn.Conv2d(3, 8, 3), norm=Norm(8))
    check(seen_data(net, noise(8, 3, 8, 8)), noise(4, 3, 8, 8))


def test_two_norms_in_a_row():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU())
    check(seen_data(net, noise(8, 3, 8, 8)), noise(4, 3, 8, 8))


def test_sums_that_broadcast():
    place = nn.Parameter(noise(1, 5, 8))
    check(Net(lambda s, x: s.b(F.relu(s.a(x) + s.place)), a=linear(), b=linear(), place=place), noise(4, 5, 8))
    query = nn.Parameter(noise(1, 8))
    check(Net(lambda s, x: s.b(s.a(query) + F.relu(x)), a=linear(), b=linear()), noise(4, 8))
    layers = {"a": nn.Conv2d(3, 8, 3, padding=1, stride=2), "b": nn.Conv2d(3, 8, 1)}
    check(Net(lambda s, x: s.a(x) + s.b(x.mean((2, 3), keepdim=True)), **layers), noise(4, 3, 2, 2), noise(4, 3, 9, 12))
    net = Net(lambda s, x: F.relu(s.b(x.mean((2, 3), keepdim=True)) + s.a(x).sin()), **layers)
    with pytest.raises(
        HubMPQError, match=r"layer 'b' cannot add shape \(4, 8, 5, 6\) to its output of shape \(4, 8, 1, 1\)"
    ):
        check(net, noise(4, 3, 2, 2), noise(4, 3, 9, 12))


SUMMANDS = {
    "transposed": lambda x: x.transpose(1, 2),
    "repeated": lambda x: x[:, :1].expand(-1, 8, -1),
    "every second": lambda x: torch.cat([x, x], -1)[..., ::2],
}


@pytest.mark.parametrize("name", SUMMANDS)
def test_summands_that_are_not_contiguous(name):
    module = check(Net(lambda s, x: F.relu(s.a(x) + SUMMANDS[name](x)), a=linear()), noise(4, 8, 8))
    assert any(part.plan.adds for part in module.modules() if hasattr(part, "plan"))
    net = Net(lambda s, x: F.relu(s.a(x) + SUMMANDS[name](x[0])[None]), a=nn.Conv2d(8, 8, 1))
    check(net, noise(1, 8, 8, 8))


def test_a_summand_is_not_overwritten_before_a_later_reader():
    """The layer "plain" takes an activation along that comes after the sum."""

    def forward(s, x):
        t = s.relu(s.i(x))
        a = s.plain(t)
        z = s.b(x) + t
        return torch.cat([z, F.relu(a)], 1)

    layers = {"i": nn.Conv2d(3, 8, 1), "plain": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(3, 8, 1), "relu": nn.ReLU()}
    check(Net(forward, **layers), noise(4, 3, 8, 8))


def test_a_graph_that_reads_a_weight_without_calling_its_layer():
    forward = lambda s, x: s.a(x).to(s.a.weight.device)  # noqa: E731
    assert hasattr(check(Net(forward, a=linear()), noise(4, 8)), "graph")


def test_one_image_without_a_batch():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    check(net, noise(4, 8, 9, 9), noise(8, 9, 9), noise(0, 8, 9, 9))


def network() -> HubMPQ:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return quantized(seen_data(net, noise(16, 3, 8, 8)), "W7A8", noise(4, 3, 8, 8))


@pytest.fixture(params=["a graph", "its layers exchanged"])
def built(request):
    mpq = network()
    x = noise(4, 3, 8, 8)
    module = mpq.to_runtime("onednn", example=x if request.param == "a graph" else {"input": x})
    assert hasattr(module, "graph") == (request.param == "a graph")
    return module


def test_inputs_of_other_dtypes(built):
    x = noise(4, 3, 8, 8).bfloat16()
    want = built(x.float())
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(built(x.to(dtype)), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (built(x.float()) - want).norm() <= 0.02 * want.norm()


def test_its_copies_compute_the_same(built):
    x = noise(4, 3, 8, 8)
    want = built(x)
    assert torch.equal(copy.deepcopy(built)(x), want)


def test_memory_of_numpy_that_is_overwritten(built):
    held = noise(4, 3, 8, 8, seed=1).numpy()
    x = torch.from_numpy(held)
    built(x)
    if not hasattr(built, "graph"):
        built[0](x)
    held[:] = noise(4, 3, 8, 8).numpy()
    assert torch.equal(built(x), built(noise(4, 3, 8, 8)))


def test_codes_are_not_held_between_calls():
    module = network().to_runtime("onednn", example={"input": noise(4, 3, 8, 8)})
    x = noise(4, 3, 8, 8)
    module(x)
    x.data.copy_(noise(4, 3, 8, 8, seed=1))  # not counted by x._version
    assert torch.equal(module(x), module(x.clone()))


def test_the_encoder_of_torch():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = noise(4, 5, 8)
    mpq = quantized(net, "W7A8", x)
    module = mpq.to_runtime("onednn")
    with torch.no_grad():
        assert (module(x) - mpq.model(x)).norm() < 0.02 * mpq.model(x).norm()


def test_a_model_reads_the_sizes_of_its_layers():
    def forward(s, x):
        x = s.a(x) if x.sum() < 1e9 else x  # no graph
        return s.b(F.relu(x)) * s.b.in_features + s.b.bias

    check(Net(forward, a=linear(), b=linear()), noise(4, 8))


@pytest.mark.parametrize("how", ["compiled", "forward of an instance"])
def test_a_model_that_is_called_by_other_means(how):
    mpq, x = network(), noise(4, 3, 8, 8)
    want = mpq.model(x)
    if how == "compiled":
        mpq.model.compile(backend="eager")
        mpq.model(x)
    else:
        mpq.model.forward = mpq.model.forward
    found = mpq.to_runtime("onednn")(x)
    assert (found - want).norm() < 0.02 * want.norm()


def test_inputs_that_are_not_numbers_are_told():
    """The codes of an input have no NaN."""
    mpq = network()
    module = mpq.to_runtime("onednn")
    x = noise(4, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    assert "layer '0' has 1 wrong values" in mpq.certify(module, [x]).reasons[0]


def test_what_only_runs_has_no_file_to_report_of(tmp_path):
    mpq = HubMPQ.from_pretrained("resnet18", pretrained=False, num_classes=3, input_size=(3, 32, 32))
    mpq.apply_policy("W4A4", [noise(8, 3, 32, 32)]).save_pretrained(tmp_path / "packed")
    pulled = HubMPQ.from_pretrained(tmp_path / "packed", runtime="onednn")
    for asked in (pulled.report, pulled.usage, pulled.base_bytes):
        with pytest.raises(HubMPQError, match="loaded with runtime='onednn' is inference-only"):
            asked()


def test_a_model_in_float64_is_refused():
    x = noise(4, 3, 8, 8)
    net = network().model.double()
    with pytest.raises(HubMPQError, match="runtime 'onednn': expected a model in float32, got float64"):
        hub_mpq.to_runtime(net, "onednn", x.double())


def test_a_cast_leaves_the_integers_alone():
    module, x = network().to_runtime("onednn"), noise(4, 3, 8, 8)
    want = module(x)
    assert torch.equal(module.bfloat16()(x), want)
    assert module.dtype == torch.float32


def test_building_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(_Engine, "_both_ways", MEASURED)
    mpq, state = network(), torch.random.get_rng_state()
    mpq.to_runtime("onednn")
    assert torch.equal(torch.random.get_rng_state(), state)
