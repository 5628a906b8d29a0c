"""Whole networks on OpenVINO and ONNX Runtime: the same values, in integers where they say so, without a word."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from runtime_toys import bert, noise, quantized, timm_net, tokens, words
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import runtimes
from hub_mpq.core.layer import LayerSpec
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.runtime import certify, to_runtime
from hub_mpq.runtime.certificate import check_layers

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
ENGINES = pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
X = noise(4, 3, 32, 32)


def checks(engine, mpq, built, *batch, **words):
    """{layer: check}, and that exactly the layers that are told compute in integers were seen."""
    found = check_layers(runtimes.get(engine).observe(built, words or batch), mpq.model)
    assert set(found) == set(built.runtime_layers.integer)
    return found


def assert_exact(found):
    for name, check in found.items():
        assert check.wrong == 0, name
        assert check.error <= 1e-5, name
        assert check.flips <= max(1, 1e-3 * check.codes), name


@pytest.fixture(scope="module")
def nets():
    """{name: network}: norms, sums, depthwise convolutions; a patch embedding, attention, GELU."""
    return {
        "resnet": timm_net("resnet10t"),
        "mobilenet": timm_net("test_efficientnet"),
        "vit": timm_net("test_vit", img_size=32),
    }


@ENGINES
@pytest.mark.parametrize(
    ("net", "level"),
    [("resnet", "W8A8"), ("resnet", "W7A8"), ("mobilenet", "W4A4"), ("vit", "W7A8"), ("vit", "W1A2")],
)
def test_every_layer_is_exact_at_any_batch(engine, net, level, nets, capfd):
    mpq = quantized(nets[net], level, X)
    built = to_runtime(mpq.model, engine, X[:1])
    assert_exact(checks(engine, mpq, built, X))
    with torch.no_grad():
        assert built(X).shape == (4, 7)
        assert built(X[:3]).shape == (3, 7)
    assert "".join(capfd.readouterr()) == ""


@ENGINES
def test_mixed_widths_and_zero_points(engine, nets):
    mpq = HubMPQ.from_module(nets["vit"], X[:1])
    names = [layer.name for layer in mpq.graph]
    mpq.graph = mpq.graph.with_fixed({name: f"W{2 + i % 7}A{2 + (i * 3) % 7}" for i, name in enumerate(names)})
    mpq.apply_policy("W4A4", [X])
    zero_points = {
        module.input_quantizer.zero_point
        for _, module in mpq.model.named_modules()
        if hasattr(module, "input_quantizer")
    }
    assert len(zero_points) > 3
    built = to_runtime(mpq.model, engine, X[:1])
    assert len(built.runtime_layers.integer) > len(names) - 3
    assert_exact(checks(engine, mpq, built, X))


def test_openvino_computes_all_layers_in_integers(nets):
    mpq = quantized(nets["resnet"], "W4A4", X)
    assert to_runtime(mpq.model, "openvino", X[:1]).runtime_layers.float == {}


def test_onnxruntime_computes_products_in_integers_and_says_what_it_does_not(nets):
    layers = to_runtime(quantized(nets["vit"], "W4A4", X).model, "onnxruntime", X[:1]).runtime_layers
    assert set(layers.float) <= {"patch_embed.proj"}


@pytest.mark.parametrize("level", ["W7A8", "W3A3"])
def test_onnxruntime_computes_convolutions_in_integers_where_only_codes_leave_them(level):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in ((3, 8), (8, 8), (8, 8))]
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval()
    mpq = quantized(net, level, X)
    built = to_runtime(mpq.model, "onnxruntime", X[:1])
    assert built.runtime_layers.integer == ("0", "2")
    assert built.runtime_layers.float == {"4": "the engine runs it in float"}
    assert_exact(checks("onnxruntime", mpq, built, X))


def test_onnxruntime_keeps_convolutions_in_float_whose_biases_it_would_round(nets):
    mpq = quantized(nets["resnet"], "W2A2", X)
    built = to_runtime(mpq.model, "onnxruntime", X[:1])
    assert built.runtime_layers.float["layer1.0.conv1"] == "its bias would be rounded too coarsely"
    assert built.runtime_layers.float["layer1.0.conv2"] == "the engine runs it in float"


@ENGINES
def test_the_whole_network_computes_the_same(engine, nets):
    """Also layers that compute in float. No bias of this network is rounded, and no code lies on a tie."""
    mpq = quantized(nets["mobilenet"], "W4A4", X)
    built = to_runtime(mpq.model, engine, X[:1])
    with torch.no_grad():
        assert (built(X) - mpq(X)).norm() < 1e-5 * mpq(X).norm()


@ENGINES
def test_a_packed_model_computes_the_same(engine, nets, tmp_path):
    mpq = HubMPQ.from_pretrained("resnet18", pretrained=False, num_classes=7, input_size=(3, 32, 32))
    mpq.apply_policy("W4A4", [X])
    mpq.save_pretrained(tmp_path)
    packed = HubMPQ.from_pretrained(tmp_path, runtime=engine)
    with torch.no_grad():
        want, got = mpq(X), packed(X)
    assert (got - want).norm() < 0.05 * want.norm()


@ENGINES
def test_an_encoder_of_any_length_by_keywords(engine):
    mpq = quantized(bert(), "W7A8", tokens())
    built = to_runtime(mpq.model, engine, tokens(2, 8))
    assert isinstance(built, type(mpq.model))
    assert (built.config, built.device, built.dtype) == (mpq.model.config, torch.device("cpu"), torch.float32)
    assert inspect.signature(built.forward) == inspect.signature(mpq.model.forward)
    batch = tokens(3, 20)
    batch["attention_mask"][1, 9:] = 0
    batch["attention_mask"][2, 5:] = 0
    assert_exact(checks(engine, mpq, built, **batch))
    with torch.no_grad():
        got, want = built(**batch), mpq.model(**batch)
        assert type(got) is type(want)
        assert list(got) == list(want)
        close = 0.3 * want.logits.norm()  # one code that falls on the other side of a tie moves what follows
        assert (got.logits - want.logits).norm() < close
        assert built(batch["input_ids"]).logits.shape == (3, 3)
        assert built(**batch, return_dict=False)[0].equal(got.logits)
    assert {"embeddings.word_embeddings" in name for name in built.runtime_layers.float} >= {True}
    with pytest.raises(HubMPQError, match="output_attentions=True is not supported"):
        built(**batch, output_attentions=True)
    with pytest.raises(HubMPQError, match="unexpected input 'inputs_embeds'"):
        built(inputs_embeds=noise(1, 4, 32))


@ENGINES
def test_a_pipeline_says_nothing(engine, capfd, caplog, recwarn):
    from transformers import pipeline

    mpq = quantized(bert(), "W7A8", tokens())
    capfd.readouterr(), caplog.clear(), recwarn.clear()
    built = to_runtime(mpq.model, engine, tokens())
    said = pipeline("text-classification", model=built, tokenizer=words())(["w3 w4 w5", "w9"])
    assert [set(one) for one in said] == [{"label", "score"}] * 2
    assert "".join(capfd.readouterr()) == ""
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]
    assert not [w for w in recwarn if "hub_mpq" in str(w.filename) or "onnx" in str(w.message)]


@ENGINES
def test_layers_that_saturate_compute_in_float(engine, nets, monkeypatch):
    """As on a CPU without VNNI."""
    mpq = quantized(nets["resnet"], "W8A8", X)
    monkeypatch.setattr(type(runtimes.get(engine)), "saturates", lambda self: True)
    built = to_runtime(mpq.model, engine, X[:1])
    layers = built.runtime_layers
    assert (
        "on a CPU without VNNI, sums of two products of 8-bit inputs and 8-bit weights saturate"
        in layers.float.values()
    )
    assert_exact(checks(engine, mpq, built, X))
    with torch.no_grad():
        assert (built(X) - mpq(X)).norm() < 0.1 * mpq(X).norm()
    spec = LayerSpec("x", "linear", (4, 64), 256, 256, 64)
    widths = {str(bits) for bits in runtimes.get(engine).menu(spec)}
    assert "W8A8" not in widths
    assert "W7A8" in widths


@ENGINES
def test_what_is_wrong_is_seen(engine, nets):
    """The certificate sees the engine's own numbers: another bias of the reference is another model."""
    mpq = quantized(nets["vit"], "W4A4", X)
    built = to_runtime(mpq.model, engine, X[:1])
    name = next(name for name in built.runtime_layers.integer if "mlp.fc1" in name)
    runs = runtimes.get(engine).observe(built, (X,))
    with torch.no_grad():
        mpq.model.get_submodule(name).bias.add_(0.01)
    assert check_layers(runs, mpq.model)[name].wrong


@ENGINES
def test_certify(engine, nets):
    mpq = quantized(nets["mobilenet"], "W4A4", X)
    built = to_runtime(mpq.model, engine, X[:1])
    found = certify(mpq.model, built, [X])
    assert set(found.layers) == set(built.runtime_layers.integer)


@ENGINES
def test_groups_of_weights_stay_float(engine):
    mpq = quantized(bert(), "W4g16A8", tokens())
    built = to_runtime(mpq.model, engine, tokens())
    assert "its weights have group scales" in built.runtime_layers.float.values()
    with torch.no_grad():
        want, got = mpq.model(**tokens()).logits, built(**tokens()).logits
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("engine", "package", "extra"),
    [("openvino", "openvino", "openvino"), ("onnxruntime", "onnxruntime", "onnx"), ("openvino", "onnxscript", "onnx")],
)
def test_without_the_package_it_says_what_to_install(engine, package, extra, nets, monkeypatch):
    mpq = quantized(nets["vit"], "W4A4", X)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HubMPQError, match=rf"pip install 'hub-mpq\[{extra}\]'"):
        to_runtime(mpq.model, engine, X)


@ENGINES
def test_where_it_cannot_run_it_says_why(engine, nets):
    mpq = quantized(nets["vit"], "W4A4", X)
    with pytest.raises(InvalidArgument, match="requires example="):
        to_runtime(mpq.model, engine)
    with pytest.raises(HubMPQError, match="expected a model on the CPU, got meta"):
        to_runtime(mpq.model.to("meta"), engine, X)


FREED = """
import gc, signal, sys, threading
import torch
from hub_mpq import HubMPQ

def free():
    built.pop(0)
    gc.collect()

x = torch.randn(2, 3, 32, 32)
mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32)).apply_policy("W8A8", [x])
built = [mpq.to_runtime(sys.argv[1]) for _ in range(3)]
free()
thread = threading.Thread(target=free)
thread.start()
thread.join()
free()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@ENGINES
def test_ctrl_c_works_after_models_were_freed_in_any_order_and_by_any_thread(engine):
    """OpenVINO unmaps the stack of signal handlers; a core for each model left it missing."""
    done = subprocess.run([sys.executable, "-c", FREED, engine], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr[-2000:]


def test_the_ir_is_written_on_request(nets, tmp_path):
    import openvino

    from hub_mpq.runtime.openvino import save_ir

    mpq = quantized(nets["resnet"], "W4A4", X)
    built = to_runtime(mpq.model, "openvino", X[:1])
    path = save_ir(built, tmp_path / "ir")
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.bin", "model.xml"]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    got = openvino.Core().compile_model(path, "CPU", settings)([X.numpy()])[0]
    assert torch.from_numpy(got).equal(built(X))
    with pytest.raises(InvalidArgument, match=r"expected a module made by to_runtime\(model, 'openvino'\)"):
        save_ir(mpq.model, tmp_path)
