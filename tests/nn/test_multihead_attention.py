"""nn.MultiheadAttention, whose own forward reads the weights of its projections: they become layers."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.nn.expose import conceal_layers, expose_layers, has_layers_to_expose, names_of_parameters
from hub_mpq.nn.multihead_attention import SplitMultiheadAttention, attend
from hub_mpq.nn.packing import predicted_nbytes
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.runtime.fused_graph import _Tracer

LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
FORMS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "vdim": 7, "batch_first": True, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_zero_attn": True, "batch_first": True},
]


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def split(module: nn.MultiheadAttention) -> SplitMultiheadAttention:
    net = nn.Sequential(copy.deepcopy(module))
    expose_layers(net)
    return net[0]


def operands(module: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Query of 4 tokens, key and value of 4, two samples."""
    torch.manual_seed(1)
    shape = ((2, 4) if module.batch_first else (4, 2)) if batched else (4,)
    query, key = torch.randn(*shape, 8), torch.randn(*shape, module.kdim)
    return query, key, key if module.kdim == module.vdim else torch.randn(*shape, module.vdim)


CAUSAL = torch.ones(4, 4).triu(1).bool()
HIDDEN = torch.tensor([[False, False, False, True], [False, False, False, False]])
MASKS = [None, CAUSAL, torch.zeros(4, 4).masked_fill(CAUSAL, float("-inf")), torch.randn(4, 4, 4)]
PADDINGS = [None, HIDDEN, torch.randn(2, 4)]


# the float function


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_float_function_is_torchs(options):
    module = attention(**options)
    ours, given = split(module), operands(module)
    assert type(ours) is SplitMultiheadAttention
    for mask, padding, need, average in itertools.product(MASKS, PADDINGS, (True, False), (True, False)):
        for causal in {False, mask is MASKS[1], mask is MASKS[2]}:
            how = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need}
            how |= {"average_attn_weights": average, "is_causal": causal}
            want, found = module(*given, **how), ours(*given, **how)
            torch.testing.assert_close(found, want, atol=1e-6, rtol=0, msg=str(how))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_one_sample_without_a_batch_axis(options):
    module = attention(**options)
    given = operands(module, batched=False)
    for padding, need in itertools.product((None, HIDDEN[0]), (True, False)):
        want = module(*given, key_padding_mask=padding, need_weights=need)
        found = split(module)(*given, key_padding_mask=padding, need_weights=need)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=0)


def test_gradients_and_dropout_are_torchs():
    module = attention(dropout=0.5).train()
    ours, (query, *_) = split(module), operands(module)
    torch.manual_seed(2)
    (want := module(query, query, query)[0].square().sum()).backward()
    torch.manual_seed(2)
    (found := ours(query, query, query)[0].square().sum()).backward()
    torch.testing.assert_close(found, want)
    grads = torch.cat([getattr(ours, name).weight.grad for name in LAYERS[:3]])
    torch.testing.assert_close(grads, module.in_proj_weight.grad)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"attn_mask": torch.zeros(3, 4)}, "attn_mask must have shape"),
        ({"key_padding_mask": torch.zeros(2, 3)}, "key_padding_mask must have shape"),
        ({"attn_mask": torch.zeros(4, 4, dtype=torch.long)}, "bool or floating point"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_what_does_not_fit_is_refused(how, message):
    module = attention()
    with pytest.raises(InvalidArgument, match=message):
        split(module)(*operands(module), **how)


def test_nested_tensors_are_refused_with_the_way_out():
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    with pytest.raises(InvalidArgument, match="key_padding_mask"):
        split(attention(batch_first=True))(nested, nested, nested)


# names and copies


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_state_dicts_are_torchs_and_load_at_any_time(options):
    module = attention(**options)
    ours, given, state = split(module), operands(module), module.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    other = split(attention(**options))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    assert torch.equal(other(*given)[0], ours(*given)[0])
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):  # noqa: S301
        assert torch.equal(again(*given)[0], ours(*given)[0])
        assert list(again.state_dict()) == list(state)
        net = nn.Sequential(again)
        conceal_layers(net)
        assert type(net[0]) is nn.MultiheadAttention
        assert torch.equal(net[0](*given)[0], module(*given)[0])
        net[0].load_state_dict(state)
    layers = {f"0.{name}.{key}": p for name in LAYERS for key, p in getattr(ours, name).named_parameters()}
    assert names_of_parameters(nn.Sequential(ours), layers).keys() <= {f"0.{key}" for key in state}


def test_no_weight_is_copied():
    net = nn.Sequential(attention())
    weight = net[0].in_proj_weight
    expose_layers(net)
    assert net[0].q_proj.weight.data_ptr() == weight.data_ptr()
    assert net[0].in_proj_weight.data_ptr() == weight.data_ptr()
    conceal_layers(net)
    assert net[0].in_proj_weight.data_ptr() == weight.data_ptr()


class Own(nn.MultiheadAttention):
    """A subclass."""


def shared() -> nn.Module:
    net = nn.ModuleList([attention(), attention()])
    net[1].in_proj_weight = net[0].in_proj_weight
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ModuleList([Own(8, 2)]),
        shared,
        lambda: nn.ModuleList([nn.utils.parametrizations.weight_norm(attention(), "in_proj_weight")]),
        lambda: nn.ModuleList([nn.utils.spectral_norm(attention(), "in_proj_weight")]),
    ],
    ids=["subclass", "shared", "parametrized", "hooked"],
)
def test_any_other_stays_as_it_is(make):
    net = make().eval()
    before = [type(module) for module in net.modules()]
    assert not has_layers_to_expose(net)
    expose_layers(net)
    assert [type(module) for module in net.modules()] == before


# quantized


class Called(nn.Module):
    """Self-attention, then one query that attends to all: of torch's module, or written with layers alone."""

    def __init__(self, of_torch: bool) -> None:
        super().__init__()
        self.of_torch = of_torch
        self.stem = nn.Linear(6, 8)
        for name in ("own", "pool"):
            if of_torch:
                setattr(self, name, nn.MultiheadAttention(8, 2, batch_first=True))
            else:
                setattr(self, name, nn.ModuleDict({layer: nn.Linear(8, 8) for layer in LAYERS}))
        self.probe = nn.Parameter(torch.ones(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def attend(self, module: Any, query: Tensor, key: Tensor) -> Tensor:
        if self.of_torch:
            return module(query, key, key, need_weights=False)[0]
        given = zip(LAYERS, (query, key, key), strict=False)
        q, k, v = (module[n](x).unflatten(-1, (2, 4)).transpose(1, 2) for n, x in given)
        return module["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.attend(self.own, x, x)
        return self.head(self.attend(self.pool, self.probe.expand(x.shape[0], 1, 8), x)[:, 0])


X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


def both() -> tuple[HubMPQ, HubMPQ]:
    """The network of torch's modules, and that of layers with the same weights."""
    torch.manual_seed(0)
    net, plain = Called(True).eval(), Called(False).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    exposed = copy.deepcopy(net)
    expose_layers(exposed)
    layers = {name: parameter for name, parameter in exposed.named_parameters() if "proj" in name}
    rest = {name: value for name, value in net.state_dict().items() if "_proj" not in name}
    plain.load_state_dict(layers | rest)
    return HubMPQ.from_module(net, X[:1]), HubMPQ.from_module(plain, X[:1])


def test_the_graph_is_that_of_layers():
    ours, plain = (mpq.graph for mpq in both())
    assert ours.names == plain.names
    for mine, its in zip(ours, plain, strict=True):
        assert (mine.macs, mine.weight_shape, mine.activation_count) == (
            its.macs,
            its.weight_shape,
            its.activation_count,
        )
        assert (mine.activation_tie, mine.input_owner, mine.fixed) == (its.activation_tie, its.input_owner, its.fixed)
    assert {layer.kind for layer in ours} == {"linear", "projection"}
    assert ours["own.k_proj"].activation_tie == "own.q_proj"
    assert ours["pool.v_proj"].activation_tie == "pool.k_proj"
    assert {op.kind for op in ours.floats} == {"attention"}  # its two products
    assert ours.other_bytes == plain.other_bytes


@pytest.mark.parametrize("level", ["W2A4", "W4A32", "W8A8"])
def test_quantized_it_computes_and_learns_what_layers_do(level):
    ours, plain = both()
    nets = []
    for mpq in (ours, plain):
        mpq.apply_policy(level, [X])
        (out := mpq.model.train()(X)).square().sum().backward()
        nets.append((out, {n: p.grad for n, p in mpq.model.named_parameters() if p.grad is not None}))
    (found, grads), (want, wanted) = nets
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)
    assert grads.keys() == wanted.keys()
    assert any("weight_quantizer" in name and "pool.k_proj" in name for name in grads)
    for name in grads:
        torch.testing.assert_close(grads[name], wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_packed_it_is_loaded_to_the_bit_and_of_the_size_that_was_told(tmp_path):
    mpq, _ = both()
    user = Called(True)
    mpq.apply_policy("W3A5", [X])
    size = mpq.save_pretrained(tmp_path / "packed")
    assert size == predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == mpq.usage().amounts["size"]
    again = HubMPQ.from_pretrained(tmp_path / "packed", module=user)
    with torch.no_grad():
        want = mpq(X)
        assert torch.equal(again(X), want)
        for model in (copy.deepcopy(mpq.model), pickle.loads(pickle.dumps(mpq.model))):  # noqa: S301
            assert torch.equal(model(X), want)
    assert type(user.own) is nn.MultiheadAttention


@pytest.mark.parametrize("exclude", [("own*",), ("own.q_proj",), ("own.out_proj", "pool.out_proj"), ("*_proj",)])
def test_what_is_left_float_is_loaded_too(tmp_path, exclude):
    """All of an attention, or one of its layers."""
    torch.manual_seed(0)
    mpq = HubMPQ.from_module(Called(True).eval(), X[:1], exclude=exclude)
    mpq.apply_policy("W3A5", [X])
    mpq.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(HubMPQ.from_pretrained(tmp_path / "packed", module=Called(True))(X), mpq(X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_is_the_same(backend):
    mpq, _ = both()
    mpq.apply_policy("W3A5", [X])
    compiled = torch.compile(mpq.model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), mpq.model(X), atol=1e-6, rtol=0)
        exported = torch.export.export(mpq.model, (X,)).module()
        torch.testing.assert_close(exported(X), mpq.model(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("runtime", ["onednn", "openvino", "onnxruntime"])
def test_runtimes_compute_it_in_integers(runtime):
    pytest.importorskip("torch" if runtime == "onednn" else runtime)
    mpq, _ = both()
    mpq.apply_policy("W7A7", [X])
    module = mpq.to_runtime(runtime)
    with torch.no_grad():
        torch.testing.assert_close(module(X), mpq.model(X), atol=1e-5, rtol=0)
    layers = module.runtime_layers
    assert {"own.q_proj", "pool.out_proj"} <= {
        *layers.integer,
        *(n for n, why in layers.float.items() if "faster" in why),
    }


# torch's own users of it


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_transformer_is_quantized(batch_first):
    torch.manual_seed(0)
    net = nn.Transformer(8, 2, 2, 2, 16, 0.0, batch_first=batch_first).eval()
    source, target = torch.randn(4, 4, 8), torch.randn(4, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    given = {"src": source, "tgt": target, "tgt_mask": mask, "src_key_padding_mask": torch.zeros(4, 4).bool()}
    mpq = HubMPQ.from_module(net, given)
    with torch.no_grad():
        torch.testing.assert_close(mpq.model(**given), net(**given), atol=1e-6, rtol=0)
    assert not [op for op in mpq.graph.floats if op.weight_count]
    assert (
        mpq.graph["decoder.layers.1.multihead_attn.k_proj"].activation_tie == "decoder.layers.1.multihead_attn.k_proj"
    )
    mpq.apply_policy("W2A4", [given])
    assert len(list(quantized_layers(mpq.model))) == len(mpq.graph) == 2 * 6 + 2 * 10
    with torch.no_grad():
        assert not torch.allclose(mpq.model(**given), net(**given), atol=1e-2)


def test_torchs_fused_encoder_keeps_off(monkeypatch):
    """It would read the weights of all layers at once, whatever has taken their places."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the fused encoder layer ran")

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).eval()
    with torch.no_grad():
        with pytest.raises(AssertionError, match="fused encoder"):
            net(torch.ones(1, 4, 8))
        expose_layers(net)
        net(torch.ones(1, 4, 8))


def test_a_graph_goes_through_it():
    net = Called(True).eval()
    expose_layers(net)
    layers: Any = {name: None for name, _ in net.named_modules() if name.endswith("_proj")}
    nodes = _Tracer(layers).trace(net).nodes
    assert [node.target for node in nodes if node.target is attend] == [attend, attend]
    assert layers.keys() <= {node.target for node in nodes if node.op == "call_module"}
