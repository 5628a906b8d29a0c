"""torch's int8 operators: exact layers, networks as one graph, layers exchanged inside models of transformers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from runtime_toys import bert, noise, quantized, seen_data, timm_net, tokens, words
from torch import nn
from torch.nn import functional as F

import hub_mpq
from hub_mpq import HubMPQ
from hub_mpq.core import runtimes
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.runtime import onednn
from hub_mpq.runtime.certificate import certificate, check_layers
from hub_mpq.runtime.exchanged import Codes, SharedCodes
from hub_mpq.runtime.in_process import _Engine
from hub_mpq.runtime.integer_layer import Grid

if runtimes.get("onednn").available() is not None:
    pytest.skip(f"onednn: {runtimes.get('onednn').available()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def integers(monkeypatch):
    """Every layer that can computes in integers, whatever is faster on this machine."""
    monkeypatch.setattr(_Engine, "_both_ways", lambda self, plan, coded: (0.0, 1.0))


def checked(mpq, module, batch):
    """The certificate of one batch."""
    with torch.no_grad():
        runs = runtimes.get("onednn").observe(module, batch)
    return certificate(module.runtime_layers, check_layers(runs, mpq.model))


class Odd(nn.Module):
    """Overwrites tensors, reads them again afterwards, and has every activation that a layer can take along."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.c, self.d, self.e = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.norm, self.clip = nn.BatchNorm2d(8), nn.Hardtanh(-0.5, 0.7)
        self.swish, self.silu = nn.Hardswish(inplace=True), nn.SiLU(inplace=True)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        F.relu(x, inplace=True)
        y = self.norm(self.b(x))
        y += x
        z = self.clip(self.c(y))
        y.mul_(0.5)
        z = self.swish(self.d(z)) + self.silu(self.e(y))
        z = F.gelu(self.fc(z.mean((2, 3))))
        return self.head(z)


NETS = {
    "odd": (lambda: seen_data(Odd(), noise(16, 3, 32, 32)), 32),
    "resnet": (lambda: timm_net("resnet18"), 32),
    "mobilenet": (lambda: timm_net("mobilenetv3_small_050"), 32),
    "relu6": (lambda: timm_net("mobilenetv2_035"), 32),
    "vit": (lambda: timm_net("vit_tiny_patch16_224", img_size=32), 32),
    "convnext": (lambda: timm_net("convnext_atto"), 32),
    "same padding": (lambda: timm_net("tf_mobilenetv3_small_minimal_100"), 33),
}


@pytest.mark.parametrize("level", ["W7A8", "W4A4", "W1A2"])
@pytest.mark.parametrize("name", NETS)
def test_every_layer_of_a_network_is_exact(name, level):
    make, size = NETS[name]
    x = noise(4, 3, size, size, seed=1)
    mpq = quantized(make(), level, x)
    before = {k: v.clone() for k, v in mpq.model.state_dict().items()}
    module = mpq.to_runtime("onednn")
    assert isinstance(module, type(mpq.model))
    assert hasattr(module, "graph"), "it is computed as one graph"
    assert set(module.runtime_layers.integer) | set(module.runtime_layers.float) == set(mpq.graph.names)
    assert len(module.runtime_layers.integer) >= len(mpq.graph) - 2, module.runtime_layers.float
    for batch in (x[:1], x, noise(3, 3, size, size, seed=2)):
        found = checked(mpq, module, (batch,))
        assert found.exact, found.reasons
        assert found.total.error < 1e-6
        assert module(batch).shape == (len(batch), mpq.model(batch).shape[-1])
    assert all(torch.equal(v, before[k]) for k, v in mpq.model.state_dict().items())
    assert not module(x).requires_grad


def test_a_network_without_ties_computes_what_the_reference_does():
    x = noise(8, 3, 32, 32, seed=1)
    mpq = quantized(NETS["odd"][0](), "W7A8", x)
    want, found = mpq(x), mpq.to_runtime("onednn")(x)
    assert (found - want).norm() < 0.02 * want.norm()


def test_another_size_of_the_image():
    mpq = quantized(timm_net("resnet18"), "W4A4", noise(4, 3, 32, 32))
    module = mpq.to_runtime("onednn")
    other = noise(2, 3, 48, 40)
    assert checked(mpq, module, (other,)).exact
    assert module(other).shape == mpq(other).shape


def test_layers_between_which_no_float_is_needed_keep_codes():
    x = noise(4, 3, 32, 32)
    module = quantized(timm_net("resnet18"), "W4A4", x, fixed={"*": None}).to_runtime("onednn")
    layers = [part for part in module.modules() if isinstance(part, onednn.OnednnLayer)]
    assert sum(layer.plan.output is not None for layer in layers) == 8, "conv1 of every block is read by conv2 alone"
    assert sum(layer.plan.adds for layer in layers) == 8, "the residual sums"
    assert not [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def test_its_memory_is_that_of_the_codes():
    x = noise(2, 3, 32, 32)
    module = quantized(timm_net("resnet18"), "W7A8", x).to_runtime("onednn")
    layers = [part for part in module.modules() if isinstance(part, onednn.OnednnLayer)]
    assert len(layers) >= 19
    floats = sum(4 * layer.shape.numel() for layer in layers)
    held = sum(layer.packed.numel() for layer in layers)  # int8
    held += sum(t.numel() * t.element_size() for layer in layers for t in layer.buffers())
    assert all(layer.plan.layer.weight.is_meta for layer in layers)
    assert held <= 0.3 * floats


@pytest.mark.parametrize("zero", range(6))
def test_ties_fall_on_the_side_of_the_reference(zero):
    grid = Grid(0.5, zero, 4)
    x = torch.arange(-40, 41) * 0.25
    want = (x / 0.5).round().add(zero).clamp(0, 15)
    assert torch.equal(Codes(grid)(x), want.to(torch.uint8))


def test_codes_are_shared_until_the_tensor_is_overwritten():
    codes, x = SharedCodes(Grid(0.1, 3, 8)), noise(4, 5)
    first = codes(x)
    assert codes(x) is first
    x += 1
    again = codes(x)
    assert not torch.equal(again, first)
    with torch.inference_mode():
        y = x.clone()
        assert torch.equal(codes(y), again)


def test_a_layer_that_saturates_computes_in_float_and_says_so(monkeypatch):
    monkeypatch.setattr(onednn, "saturates", lambda: True)
    x = noise(4, 3, 32, 32)
    mpq = quantized(timm_net("resnet18"), "W8A8", x)
    module = mpq.to_runtime("onednn")
    told = module.runtime_layers.float
    assert "without VNNI" in told["layer1.0.conv1"]
    assert checked(mpq, module, (x,)).exact
    wide = {layer.name for layer in mpq.graph if layer.name in module.runtime_layers.integer}
    assert not wide, "8-bit weights use their whole range"
    narrow = quantized(timm_net("resnet18"), "W7A8", x).to_runtime("onednn").runtime_layers
    assert "layer1.0.conv1" in narrow.integer
    assert "conv1" in narrow.float, "the stem is W8A8"


SATURATING = """
import json, sys, torch
from torch import nn
from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError
from hub_mpq.runtime import in_process, onednn

onednn.Onednn.inexact = lambda self, layer: None
in_process._Engine._both_ways = lambda self, plan, coded: (0.0, 1.0)
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
nn.init.ones_(net[0].weight)
x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 1
mpq = HubMPQ.from_module(net, x[:1]).apply_policy("W8A8", [x])
try:
    mpq.to_runtime("onednn")
    said = ""
except HubMPQError as error:
    said = str(error)
module = mpq.to_runtime("onednn", allow_inexact=True)
found = mpq.certify(module, [x])
print(json.dumps([onednn.saturates(), said, found.exact, list(found.reasons), found.total.wrong]))
"""


def test_saturation_is_seen_when_it_happens():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = [sys.executable, "-W", "ignore", "-c", SATURATING]
    done = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    saturates, said, exact, reasons, wrong = json.loads(done.stdout)
    if not saturates:
        pytest.skip("this build of oneDNN cannot be kept from VNNI")
    assert "does not compute the same model: layer '0' has" in said
    assert "allow_inexact=True" in said
    assert not exact
    assert "wrong values" in reasons[0]
    assert wrong > 0


def test_a_wrong_layer_is_found():
    x = noise(4, 3, 32, 32)
    mpq = quantized(timm_net("resnet18"), "W4A4", x, fixed={"*": None})
    module = mpq.to_runtime("onednn")
    layer = next(m for m in module.modules() if isinstance(m, onednn.OnednnLayer) and m.plan.output is None)
    layer.scale[0] *= 1.0001
    found = checked(mpq, module, (x,))
    assert [reason for reason in found.reasons if repr(layer.plan.layer.name) in reason]
    assert not found.exact


def test_a_model_of_transformers_keeps_its_class_and_config(caplog, capfd):
    from transformers import pipeline

    batch = tokens()
    mpq = quantized(bert(), "W7A8", batch)
    module = mpq.to_runtime("onednn", example=batch)
    assert type(module) is type(mpq.model)
    assert module.config is not None
    assert (module.device.type, module.dtype) == ("cpu", torch.float32)
    assert checked(mpq, module, batch).exact
    with torch.no_grad():
        want, found = mpq(**batch), module(**batch)
    assert type(found) is type(want)
    assert (found.logits - want.logits).norm() < 0.05 * want.logits.norm()
    assert module(**tokens(2, 7)).logits.shape == (2, 3)

    capfd.readouterr()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = pipeline("text-classification", model=module, tokenizer=words(), device="cpu")
        found = pipe(["w7 w8", "w9 w10 w11"], batch_size=2)
    assert len(found) == 2
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def test_generation_is_that_of_the_quantized_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=60
        )
        net = LlamaForCausalLM(config).eval()
    batch = {"input_ids": tokens()["input_ids"]}
    mpq = quantized(net, "W6A8", batch)
    want = mpq.model.generate(batch["input_ids"], max_new_tokens=8, do_sample=False)
    for name in ("torch", "onednn"):
        module = mpq.to_runtime(name)
        assert torch.equal(module.generate(batch["input_ids"], max_new_tokens=8, do_sample=False), want)


def test_a_model_that_automodel_loaded(tmp_path):
    from transformers import AutoModelForSequenceClassification

    batch = tokens()
    bert().save_pretrained(tmp_path / "float")
    HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8", [batch]).save_pretrained(tmp_path / "packed")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    module = hub_mpq.to_runtime(model, "onednn", batch)
    assert type(module) is type(model)
    assert len(module.runtime_layers.integer) >= 12
    with torch.no_grad():
        runs = runtimes.get("onednn").observe(module, batch)
    assert certificate(module.runtime_layers, check_layers(runs, model)).exact


def test_the_reference_is_equal_to_the_bit(tmp_path):
    x = noise(4, 3, 32, 32)
    mpq = quantized(timm_net("resnet18"), "W3A4", x)
    module = mpq.to_runtime("torch")
    assert torch.equal(module(x), mpq(x))
    assert module.runtime_layers.integer == ()
    batch = tokens()
    bert().save_pretrained(tmp_path / "float")
    HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8", [batch]).save_pretrained(tmp_path / "packed")
    packed = HubMPQ.from_pretrained(tmp_path / "packed", resident="packed")
    one = hub_mpq.to_runtime(packed.model, "torch", batch)
    assert torch.equal(one(**batch).logits, packed(**batch).logits)


def test_refusals(monkeypatch):
    x = noise(2, 3, 32, 32)
    mpq = quantized(timm_net("resnet18"), "W4A4", x)
    with pytest.raises(InvalidArgument, match="unknown runtime 'tensorrt'; choose from torch, onednn"):
        mpq.to_runtime("tensorrt")
    with pytest.raises(InvalidArgument, match="is not quantized; apply a policy"):
        HubMPQ.from_module(timm_net("resnet18"), x).to_runtime("onednn")
    with pytest.raises(HubMPQError, match="runtime 'onednn': expected a model in float32, got bfloat16"):
        hub_mpq.to_runtime(mpq.to_runtime("torch").bfloat16(), "onednn", x)
    monkeypatch.setattr(onednn.platform, "machine", lambda: "arm64")
    with pytest.raises(HubMPQError, match="is not available: its int8 operators require an x86 CPU, got arm64"):
        mpq.to_runtime("onednn")
    module = mpq.to_runtime("auto")
    assert module.runtime_layers.runtime == "torch"
    assert "got arm64" in module.runtime_layers.float["conv1"]


def test_a_network_that_cannot_be_traced_has_its_layers_exchanged():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            y = self.stem(x).flatten(2).transpose(1, 2)
            return self.block(y if y.sum() > 0 else -y)

    x = noise(2, 3, 6, 6)
    mpq = quantized(Branch().eval(), "W4A4", x, fixed={"*": None})
    module = mpq.to_runtime("onednn")
    assert not hasattr(module, "graph")
    assert set(module.runtime_layers.integer) == set(mpq.graph.names)
    assert checked(mpq, module, (x,)).exact


def test_a_layer_that_the_example_does_not_reach_stays_float():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, more=None):
            y = self.a(x).relu()
            return y if more is None else self.spare(y + more)

    x = noise(4, 6)
    mpq = HubMPQ.from_module(Spare().eval(), (x[:1], x[:1]), fixed={"*": None}).apply_policy("W4A4", [((x, x),)])
    for example in (x, {"x": x}):
        module = mpq.to_runtime("onednn", example=example)
        assert module.runtime_layers.integer == ("a",)
        assert module.runtime_layers.float == {"spare": "it did not run on the example"}
