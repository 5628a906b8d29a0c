"""Counts against closed forms, ties, fixed layers, what stays float, and that a model is left as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hub_mpq.adapters import build_graph, norm_of, observe_signed, trace
from hub_mpq.adapters.count import MacCounter, operands_and_macs
from hub_mpq.core import LayerBits
from hub_mpq.errors import HubMPQError, InvalidArgument


def layers_of(model, *shape, **options):
    layers, _ = trace(model, torch.randn(shape), **options)
    return {layer.name: layer for layer in layers}


def floats_of(model, *shape, **options):
    _, floats = trace(model, torch.randn(shape), **options)
    return {(op.name, op.kind): op for op in floats}


@pytest.mark.parametrize("size", [(7, 7), (13, 10), (32, 31)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        (3, 1, 1, 1, 1),
        (3, 2, 0, 1, 1),
        (3, 2, 1, 1, 4),
        (1, 2, 0, 1, 1),
        (3, 1, 2, 2, 2),
        ((1, 5), (3, 2), (0, 2), 1, 8),
    ],
)
def test_convolutions_follow_the_closed_form(size, kernel, stride, padding, dilation, groups):
    conv = nn.Conv2d(8, 16, kernel, stride, padding, dilation, groups)
    area = 1
    for n, k, s, p, d in zip(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True):
        area *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    layer = layers_of(nn.Sequential(conv), 1, 8, *size)["0"]
    weights = 16 * (8 // groups) * conv.kernel_size[0] * conv.kernel_size[1]
    assert layer.macs == weights * area
    assert layer.weight_count == weights
    assert layer.activation_count == 8 * size[0] * size[1]
    assert layer.weight_shape == tuple(conv.weight.shape)


def test_counts_are_per_sample():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    assert layers_of(net, 6, 3, 8, 8) == layers_of(net, 1, 3, 8, 8)


def test_a_batch_that_can_not_be_one_is_divided():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).view(2, -1, 3)

    assert layers_of(Pairs(), 4, 4)["fc"].macs == 12


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.shared(self.shared(self.stem(x))))


def test_a_layer_that_runs_twice_adds_up():
    layer = layers_of(Twice(), 1, 6)["shared"]
    assert (layer.macs, layer.weight_count, layer.activation_count) == (128, 64, 16)


class Block(nn.Module):
    """q, k, v of one input, plain attention, a gated MLP, a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        attention = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        x = self.o(attention @ self.v(x))
        return self.head(self.down(self.gate(x).relu() * self.up(x)))


def test_ties_owners_and_fixed_layers():
    layers, floats = trace(Block(), torch.arange(5)[None])
    by = {layer.name: layer for layer in layers}
    assert [layer.name for layer in layers] == ["embed", "q", "k", "v", "o", "gate", "up", "down", "head"]
    assert {n for n in by if by[n].activation_tie == by["q"].activation_tie} == {"q", "k", "v"}
    assert {n for n in by if by[n].activation_tie == by["up"].activation_tie} == {"gate", "up"}
    assert by["o"].activation_tie is None
    assert by["down"].activation_tie is None
    assert by["head"].weight_owner == "embed"
    assert by["embed"].weight_owner is None
    assert by["embed"].tie == by["head"].tie == "embed"
    assert by["embed"].macs == 0
    assert by["embed"].fixed == LayerBits(8, 32)
    assert by["head"].fixed == LayerBits(8, 8)
    assert [n for n in by if by[n].fixed] == ["embed", "head"]
    assert [(op.kind, op.macs, op.reason) for op in floats] == [("matmul", 2 * 5 * 5 * 8, "product of two activations")]


def test_a_tensor_that_several_layers_read_is_one_buffer():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.right = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1))
            self.after, self.q, self.k, self.head = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            x = self.stem(x)
            y = self.left(x) + self.right(x)
            z = self.after(x.mul_(2).mean((2, 3)) + y.mean((2, 3)))
            return self.head(self.q(z) + self.k(z)) + self.right[1](x).sum()  # of what is written over x

    layers = {x.name: x for x in trace(Branches(), torch.randn(1, 3, 5, 5))[0]}
    assert {n: x.input_owner for n, x in layers.items()} == dict.fromkeys(layers)  # right runs on two tensors
    Branches.forward = lambda self, x: self.head(
        self.q(z := self.after((self.left(x := self.stem(x)) + self.right(x)).mean((2, 3)))) + self.k(z)
    )
    layers = {x.name: x for x in trace(Branches(), torch.randn(1, 3, 5, 5))[0]}
    assert {n: x.input_owner for n, x in layers.items() if x.input_owner} == {"right.1": "left"}
    assert {n: x.buffer for n, x in layers.items() if x.buffer != n} == {"right.1": "left", "k": "q"}


def test_layers_of_different_parents_are_not_tied():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"k": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(2))

        def forward(self, x):
            return sum(block["k"](x) * block["v"](x) for block in self.blocks)

    by = layers_of(Cross(), 1, 4)
    assert by["blocks.0.k"].activation_tie == by["blocks.0.v"].activation_tie == "blocks.0.k"
    assert by["blocks.1.k"].activation_tie == by["blocks.1.v"].activation_tie == "blocks.1.k"


def test_other_bytes_count_shared_tensors_once():
    net = Block()
    assert build_graph(net, torch.arange(5)[None], model_id="x").other_bytes == 4 * (4 * 8 + 12 + 12 + 8)
    excluded = build_graph(net, torch.arange(5)[None], model_id="x", exclude=["embed"])
    assert {"embed", "head"}.isdisjoint(excluded.names)  # they share one Parameter
    assert excluded.other_bytes == 4 * (4 * 8 + 12 + 12 + 8 + 88)


def test_stem_head_and_their_choice():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    fixed = lambda **o: [n for n, layer in layers_of(net, 1, 3, 8, 8, **o).items() if layer.fixed]  # noqa: E731
    assert fixed() == ["0", "3"]
    assert fixed(head=()) == ["0"]
    assert fixed(head=("1",)) == ["0", "1"]
    assert fixed(exclude=["0"]) == ["3"]  # a float stem does not make the next layer the stem


class Odd(nn.Module):
    values = False

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1)
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 6)
        self.experts = nn.Parameter(torch.randn(2, 6, 7))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(7, 7))
        self.idle = nn.Linear(9, 9)
        self.out = nn.Linear(7, 2)

    def forward(self, x):
        if self.values and x.sum().item() > 1e9:  # not on meta tensors
            return x
        x = self.up(x).flatten(2).transpose(1, 2)
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = F.linear(x, self.hidden.weight, self.hidden.bias)
        return self.out(self.normed(x @ self.experts[0]))


@pytest.mark.parametrize(("device", "values"), [("cpu", False), ("cpu", True), ("meta", False), ("meta", True)])
def test_what_stays_float_counts_and_says_why(device, values):
    net, x, t = Odd().to(device), torch.randn(1, 3, 5, 5, device=device), 11 * 11
    net.values = values
    layers, floats = trace(net, x)
    assert {layer.name: layer.macs for layer in layers} == {"up": 3 * 4 * 9 * 25, "out": t * 14}
    rows = {(op.name, op.kind): op for op in floats}
    assert rows["lstm", "LSTM"].macs == t * (32 * 4 + 32 * 8)
    assert rows["lstm", "LSTM"].weight_count == 32 * 4 + 32 * 8
    assert rows["attention", "MultiheadAttention"].macs == t * 8 * 24
    assert rows["attention.out_proj", "NonDynamicallyQuantizableLinear"].macs == t * 64
    assert rows["attention", "attention"].macs == 2 * t * t * 8
    assert rows["attention", "attention"].reason == "product of two activations"
    assert rows["hidden", "Linear"].macs == t * 48
    assert "outside its own forward" in rows["hidden", "Linear"].reason
    assert rows["experts", "Odd"].macs == t * 42
    assert "3-D" in rows["experts", "Odd"].reason
    assert rows["normed", "ParametrizedLinear"].macs == t * 49
    assert rows["idle", "Linear"].macs == 0
    assert "does not run" in rows["idle", "Linear"].reason
    assert all(op.reason for op in floats)
    assert len(rows) == len(floats) == 8
    net.values = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta").eval()(x.to("meta"))  # on the CPU torch's counter does not see into fused operators
    assert counter.get_total_flops() == 2 * sum(x.macs for x in (*layers, *floats))


def test_fused_operators_count_as_their_parts():
    lstm, x = nn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(7, 2, 4)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 4)
    products = operands_and_macs("_scaled_dot_product_flash_attention", (q, k, v), None)[1]
    assert products == 2 * 3 * 5 * 6 * (8 + 4)
    with torch.no_grad(), MacCounter([""], {}) as counter:
        lstm(x)
        assert sum(counter.macs.values()) == 14 * sum(p.numel() for p in lstm.parameters() if p.ndim == 2)
        counter.macs.clear()
        F.scaled_dot_product_attention(q, k, v)
        assert sum(counter.macs.values()) == 2 * 3 * 5 * 6 * (8 + 4)
        counter.macs.clear()
        torch.mv(x[0, :, :4], x[0, 0])
        torch.addmm(x[0, :, :2], x[0], x[0].T)
        torch.baddbmm(torch.zeros(7, 2, 2), x, x.transpose(1, 2))
        torch.einsum("tbi,tci->tbc", x, x)
        assert sum(counter.macs.values()) == 8 + 16 + 7 * 16 + 7 * 16


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (
            nn.Conv2d(8, 12, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=4),
            (8, 17, 23),
            12 * 8 * 8 * 30,
        ),
        (nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), (4, 7, 7), 4 * 49 * 36),
        (nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2, output_padding=1), (4, 5, 5), 100 * 3 * 9),
        (nn.ConvTranspose1d(4, 6, 5, stride=2), (4, 11), 44 * 6 * 5),
        (nn.Conv1d(4, 6, 3, dilation=2, groups=2), (4, 20), 6 * 16 * 2 * 3),
        (nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 2)), (2, 4, 9, 9), 4 * 64 * 18),
        (nn.Linear(8, 5), (3, 7, 8), 21 * 40),
        (nn.GRU(8, 6, num_layers=2, batch_first=True), (5, 8), 5 * 3 * 6 * (14 + 12)),
    ],
)
def test_layers_of_every_form_follow_the_closed_form(layer, shape, macs):
    layers, floats = trace(nn.Sequential(layer), torch.randn(2, *shape))
    assert [x.macs for x in (*layers, *floats)] == [macs]


@pytest.mark.parametrize("length", [5, 40])  # torch multiplies matrices for the longer one
def test_distances_and_bilinear_layers_count(length):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Bilinear(6, 5, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return torch.cdist(y, y[:, 1:]).sum() + self.c(self.b(y, y[..., :5]))

    found = {(op.name, op.kind): op.macs for op in trace(Net(), torch.randn(2, length, 8))[1]}
    assert found == {("Net", "matmul"): length * (length - 1) * 6, ("b", "Bilinear"): length * 6 * 5 * 4}


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), (3, 8, 8)),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 4, 3)), (1, 8, 8)),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), (3, 8, 8)),
        (nn.Sequential(nn.Conv1d(3, 4, 3)), (3, 8)),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), (8,)),
    ],
)
def test_an_example_without_a_batch_axis_is_refused(net, shape):
    with pytest.raises(InvalidArgument, match="the example input must start with a batch dimension"):
        trace(net, torch.randn(shape))
    assert trace(net, torch.randn(2, *shape)) == trace(net, torch.randn(1, *shape))


def test_layers_may_read_samples_one_by_one():
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale, self.hidden = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, images):
            return torch.stack([self.conv(x).mean((1, 2)) * self.scale(self.hidden) for x in images])

    assert [x.macs for x in trace(OneByOne(), torch.randn(2, 3, 5, 5))[0]] == [4 * 27 * 9, 16]
    assert [x.name for x in trace(OneByOne(), ([torch.randn(3, 5, 5)],))[0]] == ["conv", "scale"]


GROUPED = {  # {operands: (first, second, offsets, MACs)}; offsets cut the axis that only one of the two has
    "rows": ((16, 32), (4, 32, 24), [2, 6, 7, 16], 16 * 32 * 24),
    "columns": ((4, 16, 32), (32, 24), [8, 8, 16, 24], 16 * 32 * 24),
    "sums": ((16, 32), (32, 24), [8, 16, 24, 32], 16 * 32 * 24),
    "batch": ((4, 16, 32), (4, 32, 24), None, 4 * 16 * 32 * 24),
}


@pytest.mark.parametrize("operands", GROUPED)
def test_a_grouped_product_that_is_not_run_has_the_shape_of_one_that_is(operands):
    first, second, ends, macs = GROUPED[operands]
    a, b = (torch.zeros(shape, dtype=torch.bfloat16, device="meta") for shape in (first, second))
    b = b.transpose(-2, -1).contiguous().transpose(-2, -1)  # column-major, as the kernel wants it
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="meta")
    found = []
    for stand_ins in (False, True):
        with MacCounter([""], {}, stand_ins=stand_ins) as counter:
            found.append(torch._grouped_mm(a, b, offsets))
        assert sum(counter.macs.values()) == macs
    assert found[0].shape == found[1].shape
    assert found[0].dtype == found[1].dtype
    assert found[1].device.type == "meta"


def test_excluded_layers_are_listed_with_their_work():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    everything = layers_of(net, 1, 3, 8, 8)
    op = floats_of(net, 1, 3, 8, 8, exclude=["[12]"])["2", "Conv2d"]
    assert (op.macs, op.weight_count, op.reason) == (everything["2"].macs, 144, "excluded by the user")
    with pytest.raises(InvalidArgument, match=r"'nope\*' matches none of the 3"):
        trace(net, torch.randn(1, 3, 8, 8), exclude=["nope*"])


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.fc = nn.Linear(3, 3)
        self.direct, self.relu_first, self.after_sum = (nn.BatchNorm2d(3) for _ in range(3))
        self.view, self.often = nn.BatchNorm1d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.direct(self.conv1(x))
        z = self.relu_first(F.relu_(self.conv2(y)))
        w = self.after_sum(y + z)
        w = self.often(self.conv3(self.often(self.conv4(w))))
        return self.view(self.fc(w.flatten(2).transpose(1, 2)).flatten(0, 1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_and_the_layer_they_follow(device):
    found = norm_of(Norms().to(device), torch.randn(2, 3, 4, 4, device=device))
    assert found == {"direct": "conv1", "view": "fc"}


def test_signs_of_inputs():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert observe_signed(net, ["0", "2"], torch.randn(16, 4)) == {"0": True, "2": False}
    assert observe_signed(net, ["0", "2"], torch.rand(16, 4)) == {"0": False, "2": False}


class Writer(nn.Module):
    """A forward that writes to everything it can reach, and draws random numbers."""

    def __init__(self, values):
        super().__init__()
        self.conv, self.bn, self.values = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), values
        self.register_buffer("calls", torch.zeros(()))
        self.cache = {}
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        if self.values and x.sum().item() > 1e9:  # not on meta tensors
            return x
        self.calls += 1
        self.cache[str(x.device)] = self.latest = x
        return self.dropout(self.bn(self.conv(x + torch.rand_like(x))))


@pytest.mark.parametrize("values", [False, True])
def test_the_model_is_left_as_it_was(values):
    net = Writer(values).train()
    net.bn.eval()
    net.conv.weight.requires_grad_(False)
    handle = net.register_forward_hook(lambda *_: None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    parameters = {k: (id(p), p.requires_grad) for k, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    attributes = [set(m.__dict__) for m in net.modules()]
    state = torch.get_rng_state()
    layers, _ = trace(net, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    norm_of(net, torch.ones(1, 3, 4, 4))
    observe_signed(net, ["conv"], torch.ones(1, 3, 4, 4))
    assert layers[0].macs == 9 * 16
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: (id(p), p.requires_grad) for k, p in net.named_parameters()} == parameters
    assert [m.training for m in net.modules()] == modes
    assert [set(m.__dict__) for m in net.modules()] == attributes
    assert net.cache == {}
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert list(net._forward_hooks) == [handle.id]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.children())
    assert torch.is_grad_enabled()


def test_a_meta_model_that_looks_at_values_runs_on_zeros():
    with torch.device("meta"):
        net = Writer(True)
    layers, _ = trace(net, torch.randn(1, 3, 4, 4))
    assert layers[0].macs == 9 * 16
    assert net.conv.weight.is_meta


def test_an_example_that_does_not_fit_is_one_sentence():
    with pytest.raises(HubMPQError, match="Sequential does not run on the example input"):
        trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 5))


@pytest.mark.parametrize("part", ["weight_packed", "weight_zero_point", "input_scale"])
@pytest.mark.parametrize("where", ["", "0", "1.inner"])
def test_names_that_packed_files_use_are_refused_at_once(part, where):
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential())
    net[1].inner = nn.Linear(4, 4)
    net.get_submodule(where).register_buffer(part, torch.ones(3))
    with pytest.raises(InvalidArgument, match=f"name '{f'{where}.' if where else ''}{part}' is reserved .*rename it"):
        build_graph(net, torch.zeros(1, 4), model_id="m")


def test_a_layer_is_left_out_by_its_exact_name():
    net = nn.Module()
    for name in ("a[0]", "a0"):
        net.add_module(name, nn.Linear(4, 4))
    net.forward = lambda x: net._modules["a0"](torch.relu(net._modules["a[0]"](x)))
    graph = build_graph(net, torch.zeros(2, 4), model_id="net", exclude=["a[0]"])
    assert graph.names == ("a0",)
