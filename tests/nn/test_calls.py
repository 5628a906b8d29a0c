"""However a network calls its layers, it computes with their quantized weights and inputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo  # lists torch's functions when it is imported, before a test replaces one
from torch import nn
from torch.nn import functional as F

from hub_mpq import HubMPQ
from hub_mpq.hub.plugin_load import to_float
from hub_mpq.nn.layers import replace_layer
from hub_mpq.nn.packed import PackedLayer, float_layer, packed_layer
from hub_mpq.nn.packing import packed_tensors
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.pack import Manifest
from hub_mpq.pack.layout import flatten

G = torch.Generator().manual_seed(0)
SEQUENCES = torch.randn(6, 7, 8, generator=G)
PADDED = torch.arange(7).expand(6, 7) >= torch.tensor([7, 6, 5, 4, 3, 2])[:, None]


def quantized(net: nn.Module, *args: torch.Tensor, level: str = "W2A2", **options: object) -> HubMPQ:
    torch.manual_seed(0)
    example = tuple(x[:1] for x in args)
    mpq = HubMPQ.from_module(net.eval(), example, fixed={"*": None}, **options)
    return mpq.apply_policy(level, [args] if len(args) == 1 else [dict(zip(("x", "mask"), args, strict=True))])


def packed(mpq: HubMPQ) -> nn.Module:
    """The same network with packed layers, as the transformers plug-in makes them."""
    graph, policy = mpq.graph, mpq.policy
    tensors = flatten(packed_tensors(mpq.model, Manifest("", None, "module", graph, policy)))
    net = copy.deepcopy(mpq.float_model)
    for layer in graph:
        parts = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == layer.name}
        old = net.get_submodule(layer.name)
        replace_layer(net, layer.name, packed_layer(old, layer, policy.bits[layer.name], parts, dtype=torch.float32))
    return net.eval()


# nn.TransformerEncoder


class Encoder(nn.Module):
    def __init__(self, first: type = nn.TransformerEncoderLayer, **options: object) -> None:
        super().__init__()
        options = {"batch_first": True, "dropout": 0.0, **options}
        self.encoder = nn.TransformerEncoder(first(8, 2, 12, **options), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x, x)


class Own(nn.TransformerEncoderLayer):
    """A subclass."""


def plain(model: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What the layers give when each is called."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return model(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.fixture
def no_fused_encoder(monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the fused encoder layer ran")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", refuse)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": False}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}, {"first": Own}],
    ids=str,
)
def test_an_encoder_is_quantized_in_every_mode(no_fused_encoder, options):
    torch.manual_seed(0)
    mpq = quantized(Encoder(**options), SEQUENCES)
    want = plain(mpq.model, SEQUENCES)
    assert (want - plain(mpq.float_model, SEQUENCES)).norm() > 0.1 * want.norm()
    for model in (mpq.model, copy.deepcopy(mpq.model), pickle.loads(pickle.dumps(mpq.model)), packed(mpq)):  # noqa: S301
        assert torch.equal(model(SEQUENCES), want)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.allclose(model(SEQUENCES), want, atol=1e-6)
                alone = model.encoder.layers[1](SEQUENCES)
        assert torch.allclose(alone, plain(model.encoder.layers[1], SEQUENCES), atol=1e-6)


def test_an_encoder_with_padding_hands_no_nested_tensors_to_its_layers(monkeypatch):
    monkeypatch.delattr(torch, "_nested_tensor_from_mask")
    torch.manual_seed(0)
    for exclude in ((), ("encoder.layers.0.*",)):  # the first layer alone decides for torch
        net = Encoder()
        mpq = quantized(net, SEQUENCES, PADDED, exclude=exclude)
        for model in (mpq.model, copy.deepcopy(mpq.model)):
            with torch.no_grad():
                found = model(SEQUENCES, PADDED)
            assert torch.allclose(found, plain(model, SEQUENCES, PADDED), atol=1e-6)
        assert net.encoder.use_nested_tensor  # the user's own network is as it was


def test_a_decoder_and_a_reloaded_encoder_are_quantized(no_fused_encoder, tmp_path):
    torch.manual_seed(0)
    for net in (Decoder(), Encoder()):
        mpq = quantized(net, SEQUENCES)
        mpq.save_pretrained(tmp_path / type(net).__name__)
        again = HubMPQ.from_pretrained(tmp_path / type(net).__name__, module=net).model
        with torch.no_grad():
            assert torch.allclose(mpq.model(SEQUENCES), plain(mpq.model, SEQUENCES), atol=1e-6)
            assert torch.equal(again(SEQUENCES), mpq.model(SEQUENCES))


def test_a_layer_that_is_float_again_does_not_keep_torch_from_its_fast_way():
    net = packed(quantized(Encoder(), SEQUENCES))
    layer = net.encoder.layers[0].linear1
    assert isinstance(layer, PackedLayer)
    assert len(layer._forward_pre_hooks) == 1
    assert not float_layer(layer, torch.float32)._forward_pre_hooks


# names of arguments, names of modules


class ByKeyword(nn.Module):
    """Every kind, called by the name that its float forward has."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(1, 4, 3)
        self.transposed = Conv1D(6, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv(input=image)).mean((2, 3)) + self.embed(input=ids)
        return self.head(input=F.gelu(self.transposed(x=x)))


BATCH = {"image": torch.randn(5, 1, 6, 6, generator=G), "ids": torch.arange(5)}
ONE = {name: x[:1] for name, x in BATCH.items()}


@pytest.fixture
def by_keyword() -> HubMPQ:
    torch.manual_seed(0)
    mpq = HubMPQ.from_module(ByKeyword().eval(), ONE, fixed={"*": None})
    return mpq.apply_policy("W3A4", [BATCH])


def by_position(model: nn.Module) -> torch.Tensor:
    x = F.gelu(model.conv(BATCH["image"])).mean((2, 3)) + model.embed(BATCH["ids"])
    return model.head(F.gelu(model.transposed(x)))


def test_a_layer_takes_its_input_by_any_keyword(by_keyword, tmp_path):
    want = by_position(by_keyword.model)
    assert {n for n, m in quantized_layers(by_keyword.model)} == {"embed", "conv", "transposed", "head"}
    assert by_keyword.graph["head"].activation_count == 6
    assert by_keyword.model.head.input_quantizer.scale.item() != 1.0  # it was calibrated
    assert torch.equal(by_keyword.model(**BATCH), want)
    assert torch.equal(packed(by_keyword)(**BATCH), want)
    by_keyword.save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=ByKeyword()).model(**BATCH), want)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.mid, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body[1](input=self.body[0](input=x)))
        return self.head(input=F.relu(self.mid(input=x)))


@pytest.mark.parametrize("strategy", ["limpq", "hessian", "gradient", "seam"])
def test_strategies_see_what_a_layer_was_called_on_by_keyword(strategy):
    torch.manual_seed(0)
    net, x, y = Keywords().eval(), torch.randn(12, 4, generator=G), torch.arange(12) % 3
    found = []
    for model in (net, _positional(net)):
        data = torch.utils.data.TensorDataset(x, y)
        mpq = HubMPQ.from_module(model, x[:1])
        train = torch.utils.data.DataLoader(data, batch_size=6)
        scores = mpq.train_scores(train, strategy=strategy, steps=2, candidates=[2, 4])
        found.append((scores.weight, scores.activation, scores.pairs))
    assert found[0] == found[1]


def _positional(net: Keywords) -> nn.Module:
    class Positions(Keywords):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.mid(F.relu(self.body(x)))))

    out = Positions()
    out.load_state_dict(net.state_dict())
    return out.eval()


class OddNames(nn.Module):
    """Modules of the user's own with the names that quantizers and packed files use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.weight_quantizer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.weight_packed = nn.ModuleDict({"input_quantizer": nn.LayerNorm(4), "weight_scale": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.weight_quantizer(F.relu(self.stem(x)))
        for layer in self.weight_packed.values():
            x = layer(x)
        return self.head(x)


def test_modules_named_like_quantizers_keep_their_tensors(tmp_path):
    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    torch.manual_seed(0)
    net, x = OddNames(), torch.randn(6, 4, generator=G)
    mpq = quantized(net, x, level="W4A4")
    with torch.no_grad():
        mpq.model.weight_quantizer[1].bias += 1
        mpq.model.weight_packed["input_quantizer"].bias -= 2
    want = mpq.model(x)
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"]
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net).model(x), want)
    copied = OddNames()
    copied.load_state_dict(float_copy_state(mpq.model, libraries.get("module")))
    assert torch.equal(copied.weight_packed["input_quantizer"].bias, mpq.model.weight_packed["input_quantizer"].bias)
    weight = mpq.model.head.weight_quantizer(mpq.model.head.weight)
    assert torch.equal(copied.head.weight, weight)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.two = nn.ModuleList([self.one])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.two[0](F.relu(self.one(x)))))


def test_a_layer_under_two_names_is_one_quantized_layer(tmp_path):
    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(6, 4, generator=G)
    mpq = quantized(net, x)
    model = mpq.model
    assert model.two[0] is model.one
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"]
    again = HubMPQ.from_pretrained(tmp_path, module=net).model
    assert torch.equal(again(x), model(x))
    assert again.two[0] is again.one
    copied = Twice()
    copied.load_state_dict(float_copy_state(model, libraries.get("module")))
    assert torch.equal(copied.two[0].weight, model.one.weight_quantizer(model.one.weight))


class InList(nn.Module):
    """Layers that the forward reaches by other references than the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.in_list, self.in_dict, self.in_tuple = [self.a], {"b": [self.b]}, (self.c,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.in_list, *self.in_dict["b"], *self.in_tuple):
            x = F.gelu(layer(x))
        return self.head(x)


def test_layers_that_a_list_holds_beside_their_registration_are_quantized(tmp_path):
    torch.manual_seed(0)
    net, x = InList(), SEQUENCES[:, 0, :4]
    mpq = quantized(net, x)
    model = mpq.model
    want = model.head(F.gelu(model.c(F.gelu(model.b(F.gelu(model.a(x)))))))
    assert (want - mpq.float_model(x)).norm() > 0.01 * want.norm()
    mpq.save_pretrained(tmp_path)
    wrapped = packed(mpq)
    for form in (model, wrapped, HubMPQ.from_pretrained(tmp_path, module=net).model):
        assert torch.equal(form(x), want)
    to_float(wrapped, torch.float32)
    assert type(wrapped.in_list[0]) is nn.Linear
    plain_net = InList()
    plain_net.load_state_dict(wrapped.state_dict())
    assert torch.equal(wrapped(x), plain_net(x))


# compilers


def compiled(model: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")(**BATCH)


def exported(model: nn.Module) -> torch.Tensor:
    return torch.export.export(model, (), BATCH).module()(**BATCH)


def strictly_exported(model: nn.Module) -> torch.Tensor:
    return torch.export.export(model, (), BATCH, strict=True).module()(**BATCH)


@pytest.mark.parametrize("run", [compiled, exported, strictly_exported])
@pytest.mark.parametrize("form", ["quantizers", "packed"])
def test_compilers_trace_the_whole_model(by_keyword, form, run):
    model = by_keyword.model if form == "quantizers" else packed(by_keyword)
    zeros = {int(q.zero_points) for _, m in quantized_layers(by_keyword.model) if (q := m.input_quantizer) is not None}
    assert zeros - {0}
    assert torch.equal(run(model), model(**BATCH))
    if run is not strictly_exported:
        with torch.no_grad():
            assert torch.equal(run(model), model(**BATCH))


def test_a_compiled_model_has_the_gradients_of_the_plain_one(by_keyword):
    found = []
    for run in (lambda model: model(**BATCH), compiled):
        by_keyword.model.zero_grad()
        (run(by_keyword.model) * torch.arange(15.0).view(5, 3)).sum().backward()
        found.append({name: p.grad.clone() for name, p in by_keyword.model.named_parameters()})
    assert any("input_quantizer" in name and grad.abs().max() > 0 for name, grad in found[0].items())
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("form", ["quantizers", "packed"])
def test_an_exported_model_takes_batches_of_any_size(by_keyword, form):
    model = by_keyword.model if form == "quantizers" else packed(by_keyword)
    batch = torch.export.Dim("batch")
    sizes = {name: {0: batch} for name in BATCH}
    program = torch.export.export(model, (), BATCH, dynamic_shapes=sizes).module()
    for n in (2, 5, 7):
        given = {"image": BATCH["image"].repeat(2, 1, 1, 1)[:n], "ids": BATCH["ids"].repeat(2)[:n]}
        assert torch.equal(program(**given), model(**given))


@pytest.mark.parametrize(("per_channel", "dead"), [(True, [0, 2]), (False, [0, 1, 2, 3])])
def test_a_compiled_layer_leaves_zero_like_a_plain_one(per_channel, dead):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 4)), SEQUENCES[:, 0]
    net[0].weight.data[dead] = 0
    mpq = HubMPQ.from_module(net, x[:1], fixed={"*": None})
    mpq.apply_policy("W3A3", [x], per_channel=per_channel)
    twin = copy.deepcopy(mpq.model)
    fast = torch.compile(mpq.model, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        for model, run in ((mpq.model, fast), (twin, twin)):
            model.zero_grad()
            (run(x) - torch.arange(4.0)).square().sum().backward()
        for (name, p), other in zip(twin.named_parameters(), mpq.model.parameters(), strict=True):
            assert torch.allclose(other.grad, p.grad, rtol=1e-3, atol=1e-5), name
        with torch.no_grad():
            for p in (*twin.parameters(), *mpq.model.parameters()):
                p -= 0.01 * p.grad
    assert mpq.model[0].weight[dead].abs().amax(1)[1:].min() > 0.01
    assert torch.equal(fast(x), mpq.model(x))
    assert torch.allclose(fast(x), twin(x), rtol=1e-4, atol=1e-5)
