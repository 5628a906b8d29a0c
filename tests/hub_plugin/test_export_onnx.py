"""ONNX with QDQ nodes: ONNX Runtime computes what we compute."""

from __future__ import annotations

import sys

import onnx
import onnxruntime as ort
import pytest
import torch
from plugin_toys import pack

from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError
from hub_mpq.nn.quantize import quantized_layers

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(folder, *inputs):
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


def stored(folder):
    graph = onnx.load(folder / "model.onnx").graph
    types = {i.name.split(".")[0]: i.data_type for i in graph.initializer if "integers" in i.name}
    return types, [node.op_type for node in graph.node]


SATURATES = "ignore:ONNX. sums of:UserWarning"


@pytest.mark.parametrize(("level", "per_channel"), [("W1A2", True), ("W3A8", False), ("W5A7", True)])
def test_a_network_of_convolutions(net, level, per_channel, tmp_path):
    mpq = HubMPQ.from_module(net, X[:1]).apply_policy(level, [X], per_channel=per_channel)
    with pytest.warns(UserWarning, match=r"2 layers at W8A8 \(first: '0'\) can saturate"):
        size = mpq.export(tmp_path, "onnx")
    assert size == (tmp_path / "model.onnx").stat().st_size
    # the same integers and scales; float sums may differ in order, and an input of a quantizer that lies within
    # such a difference of a rounding border may move by one step of it
    assert torch.allclose(run(tmp_path, X), mpq(X), atol=1e-5)
    types, nodes = stored(tmp_path)
    assert set(types.values()) == {onnx.TensorProto.INT8}
    assert len(types) == 5
    assert nodes.count("QuantizeLinear") == 5
    assert nodes.count("DequantizeLinear") == 10
    assert nodes.count("Clip") == (0 if level == "W3A8" else 3)
    raw = (tmp_path / "model.onnx").read_bytes()
    assert str(sys.prefix).encode() not in raw, "paths of this machine"
    assert b".py" not in raw


def from_a_tie(mpq, ids):
    """How near to the middle between two codes the inputs of layers come, in steps.

    In the middle, the last bit of another program's product decides on the code.
    """
    nearest = [1.0]

    def look(layer, args):
        steps = args[0] / layer.input_quantizer.scale.detach()
        nearest.append(float((steps - steps.floor() - 0.5).abs().min()))

    layers = [layer for _, layer in quantized_layers(mpq.model) if layer.input_quantizer is not None]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.no_grad():
        mpq(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert len(nearest) > 1
    return min(nearest)


def test_a_decoder_with_tied_head_of_any_length(tmp_path):
    case = pack(tmp_path, "gpt2", "W4A6")
    with pytest.warns(UserWarning, match=r"1 layers at W8A8 \(first: 'lm_head'\) can saturate"):
        size = case.mpq.export(tmp_path / "onnx", "onnx")
    assert size < 60_000
    first = case.inputs["input_ids"]
    pairs = (torch.cat([first, first.roll(i, 1)]) for i in range(1, 12))
    ids = next(ids for ids in pairs if from_a_tie(case.mpq, ids) > 2e-5)
    want = case.mpq(input_ids=ids)[0]
    assert torch.allclose(run(tmp_path / "onnx", ids), want, atol=1e-5)


def test_without_the_package_it_says_what_to_install(net, tmp_path, monkeypatch):
    mpq = HubMPQ.from_module(net, X[:1]).apply_policy("W4", [X])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(HubMPQError, match=r"pip install 'hub-mpq\[onnx\]'"):
        mpq.export(tmp_path, "onnx")


@pytest.mark.filterwarnings(SATURATES)
def test_layers_that_stay_float_are_told(net, tmp_path):
    mpq = HubMPQ.from_module(net, X[:1]).apply_policy("W4", [X])
    with pytest.warns(UserWarning, match=r"3 layers compute in float \(first: '3'\): its input is not quantized"):
        mpq.export(tmp_path, "onnx")
    assert torch.allclose(run(tmp_path, X), mpq(X), atol=1e-5)


@pytest.mark.filterwarnings(SATURATES)
def test_groups_of_weights_are_written_in_float(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), *(torch.nn.Linear(a, b) for a, b in ((64, 16), (16, 16), (16, 4)))
        )
    mpq = HubMPQ.from_module(net.eval(), X[:1]).apply_policy("W4g8A8", [X])
    with pytest.warns(UserWarning, match=r"first: .*its weights have group scales"):
        mpq.export(tmp_path, "onnx")
    assert torch.allclose(run(tmp_path, X), mpq(X), atol=1e-5)
