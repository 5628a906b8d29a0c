"""A kind of layer that the package does not know: registered here, it is traced, searched, packed and loaded."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ, adapters
from hub_mpq.core import LayerBits, LayerKind, LayerSpec, layer_kinds, register_layer_kind
from hub_mpq.core.files import PACKED
from hub_mpq.cost.size import channel_count, packed_shape
from hub_mpq.errors import InvalidArgument, PackedFormat
from hub_mpq.nn.layers import operands
from hub_mpq.nn.packed import PackedLayer, float_layer, packed_layer
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.nn.types import layer_kind, why_not
from hub_mpq.pack import pack_weight, parse_manifest, read_manifest, read_packed

PAIRS, FEATURES = 2, 5
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Scale(nn.Module):
    """x [N, 2, features] times a weight of one sample's shape, element by element."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(PAIRS, features))

    def forward(self, x):
        return x * self.weight


class QuantScale(nn.Module):
    def forward(self, x):
        x, weight = operands(self, x)
        return x * weight


class PackedScale(PackedLayer):
    forward = QuantScale.forward


KIND = LayerKind(
    name="toy",
    channel_axis=1,
    row_axes=(1, 0),
    types=(f"{__name__}.{Scale.__qualname__}",),
    quantized=QuantScale,
    packed=f"{__name__}:PackedScale",
    shares_input=True,
    macs=lambda module, x, y: y.numel(),
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, PAIRS * FEATURES), nn.Linear(PAIRS * FEATURES, 3)
        self.left, self.right = Scale(FEATURES), Scale(FEATURES)

    def forward(self, x):
        x = self.stem(x).relu().unflatten(1, (PAIRS, FEATURES))
        return self.head((self.left(x) + self.right(x)).flatten(1))


@pytest.fixture
def toy():
    register_layer_kind(KIND)
    yield KIND
    layer_kinds.unregister(KIND.name)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def test_a_kind_is_found_from_its_registration_on(net):
    assert layer_kind(net.left) is None
    assert "no quantized form of Scale" in why_not(net.left)
    register_layer_kind(KIND)
    try:
        assert layer_kind(net.left) is KIND
        assert why_not(net.left) == ""
    finally:
        layer_kinds.unregister(KIND.name)
    assert layer_kind(net.left) is None


def test_its_layers_are_traced(toy, net):
    graph = adapters.from_module(net, X).graph
    assert [(x.name, x.kind, x.fixed is None) for x in graph] == [
        ("stem", "linear", False),
        ("left", "toy", True),
        ("right", "toy", True),
        ("head", "linear", False),
    ]
    assert {(x.macs, x.activation_count, x.activation_tie) for x in graph.searched} == {(10, 10, "left")}
    assert not graph.floats
    assert not graph["left"].weight_only


def test_without_shared_inputs_its_layers_are_not_tied(net):
    register_layer_kind(replace(KIND, shares_input=False))
    try:
        assert {x.activation_tie for x in adapters.from_module(net, X).graph} == {None}
    finally:
        layer_kinds.unregister(KIND.name)


def test_an_excluded_layer_counts_what_its_kind_says(toy, net):
    graph = adapters.from_module(net, X, exclude=["right"]).graph
    assert [(op.name, op.macs, op.weight_count) for op in graph.floats] == [("right", 10, 10)]


def test_what_a_kind_counts_takes_the_place_of_its_operators(net):
    class Mixed(Scale):
        def forward(self, x):
            return x * (self.weight @ self.weight.mT @ self.weight)

    register_layer_kind(replace(KIND, types=(f"{__name__}.{Mixed.__qualname__}",)))
    try:
        net.left = Mixed(FEATURES)
        assert adapters.from_module(net, X).graph["left"].macs == 10
    finally:
        layer_kinds.unregister(KIND.name)


def batches():
    return [(X, torch.arange(8) % 3)]


@pytest.mark.parametrize("strategy", [None, "mse", "ebs"])
def test_from_the_module_to_the_reloaded_folder(strategy, toy, net, tmp_path):
    mpq = HubMPQ.from_module(net, X)
    if strategy is None:
        mpq.train_indicators(batches(), candidates=[2, 4, 6], steps=2)
    else:
        mpq.train_scores(batches(), strategy=strategy, candidates=[2, 4, 6], steps=2)
    policy = mpq.search(weight_bits=4, bitops="W4A4").policy
    mpq.apply_policy(policy, batches())
    layers = dict(quantized_layers(mpq.model))
    assert {type(layers[name]) for name in ("left", "right")} == {QuantScale}
    assert layers["left"].weight_quantizer.scale.shape == (FEATURES,)
    assert not torch.equal(mpq.model(X), net(X))
    assert " toy " in mpq.report()
    size = mpq.save_pretrained(tmp_path)
    assert size == (tmp_path / PACKED).stat().st_size == mpq.usage()["size"]
    again = HubMPQ.from_pretrained(tmp_path, module=net)
    assert again.policy == policy
    assert torch.equal(again.model(X), mpq.model(X))
    with torch.no_grad():
        assert (mpq.model(X) - net(X)).norm() < 0.5 * net(X).norm()


def test_its_packed_layer_computes_the_same_and_unpacks_to_the_float_one(toy, net):
    mpq = HubMPQ.from_module(net, X)
    mpq.apply_policy("W3A5", batches())
    quant, layer = mpq.model.left, mpq.graph["left"]
    q = quant.weight_quantizer
    weight = pack_weight(q.to_int(quant.weight), q.scale.detach(), "toy", 3)
    assert weight.weight_packed.shape == packed_shape("toy", layer.weight_shape, 3) == (FEATURES, 1)
    assert channel_count("toy", layer.weight_shape) == FEATURES
    assert torch.equal(weight.unpack(), q.to_int(quant.weight).to(torch.int8))
    zero = torch.tensor([quant.input_quantizer.zero_point])
    parts = weight.parts() | {"input_scale": quant.input_quantizer.scale.detach(), "input_zero_point": zero}
    packed = packed_layer(copy.deepcopy(net.left), layer, LayerBits(3, 5), parts, dtype=torch.float32)
    assert type(packed) is PackedScale
    x = torch.randn(3, PAIRS, FEATURES)
    assert torch.equal(packed(x), quant(x))
    plain = float_layer(packed, torch.float32)
    assert type(plain) is Scale
    assert vars(plain).keys() - vars(net.left).keys() == {"_is_hf_initialized"}
    assert torch.equal(plain(x), x * quant.weight_quantizer(quant.weight))


def test_a_file_with_a_kind_that_nobody_registered_is_refused_when_it_is_read(net, tmp_path):
    register_layer_kind(KIND)
    try:
        HubMPQ.from_module(net, X).apply_policy("W4A4", batches()).save_pretrained(tmp_path)
    finally:
        layer_kinds.unregister(KIND.name)
    path = tmp_path / PACKED
    for read in (read_packed, read_manifest, lambda path: parse_manifest(path.read_bytes(), "there")):
        with pytest.raises(PackedFormat, match="layer 'left' has unknown kind 'toy'"):
            read(path)
    with pytest.raises(PackedFormat, match="register_layer_kind"):
        HubMPQ.from_pretrained(tmp_path, module=net)


def test_the_error_stays_short_whatever_a_file_calls_its_kind(net, tmp_path):
    kind = replace(KIND, name="x" * 5000)
    register_layer_kind(kind)
    try:
        HubMPQ.from_module(net, X).apply_policy("W4A4", batches()).save_pretrained(tmp_path)
    finally:
        layer_kinds.unregister(kind.name)
    with pytest.raises(PackedFormat) as refused:
        read_manifest(tmp_path / PACKED)
    assert f"kind '{'x' * 39}; register" in str(refused.value)


def test_a_kind_that_reads_indices_has_no_input_width():
    layer = LayerSpec("emb", "toy", (4, 2), 0, 8, 3)
    for reads in (True, False):
        register_layer_kind(replace(KIND, reads_indices=reads))
        try:
            assert layer.weight_only == reads
        finally:
            layer_kinds.unregister(KIND.name)


def test_kinds_that_do_not_fit_are_refused(toy):
    with pytest.raises(InvalidArgument, match="row_axes must be"):
        replace(KIND, row_axes=(0, 2))
    with pytest.raises(InvalidArgument, match="channel_axis must be the row axis"):
        replace(KIND, channel_axis=0)
    with pytest.raises(InvalidArgument, match="channel_axis must be the row axis"):
        replace(KIND, row_axes=None, channel_axis=2)
    with pytest.raises(InvalidArgument, match="is already registered"):
        register_layer_kind(replace(KIND, shares_input=False))
    with pytest.raises(InvalidArgument, match=r"Linear already belongs to the layer kind 'linear'"):
        register_layer_kind(replace(KIND, name="other", types=("torch.nn.modules.linear.Linear",)))
    assert "other" not in layer_kinds


def test_kinds_are_looked_up_without_torch():
    lines = (
        "import sys",
        "from hub_mpq.core import LayerSpec, layer_kinds",
        "from hub_mpq.cost.size import packed_nbytes",
        "names = ['conv2d', 'convolution1d', 'convolution3d', 'conv_transpose1d', 'conv_transpose2d',"
        " 'conv_transpose3d', 'linear', 'projection', 'conv1d', 'embedding', 'experts', 'experts_transposed']",
        "assert layer_kinds.names() == names",
        "assert LayerSpec('e', 'embedding', (4, 2), 0, 8, 3).weight_only and packed_nbytes('linear', (4, 2), 8) == 16",
        "assert LayerSpec('e', 'experts', (3, 4, 2), 0, 24, 3).weight_only",
        "assert packed_nbytes('experts', (3, 4, 2), 8) == packed_nbytes('experts_transposed', (3, 2, 4), 8) == 48",
        "assert 'torch' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
