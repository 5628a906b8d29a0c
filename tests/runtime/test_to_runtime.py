"""HubMPQ on a runtime: pulled, evaluated, certified, and what of it stands in the card."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from runtime_toys import bert, noise, quantized, tokens
from torch import nn
from typer.testing import CliRunner

from hub_mpq import HubMPQ, Runtime, register_runtime
from hub_mpq.cli.app import app
from hub_mpq.core import runtimes
from hub_mpq.core.runtime import RuntimeLayers
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.runtime.certificate import Certificate, LayerCheck, certificate


@pytest.fixture
def folder(tmp_path):
    """A packed folder of a network that a hub can build."""
    mpq = HubMPQ.from_pretrained("resnet18", pretrained=False, num_classes=7, input_size=(3, 32, 32))
    mpq.apply_policy("W4A4", [noise(8, 3, 32, 32)])
    mpq.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def test_a_pulled_model_runs_on_a_runtime(folder):
    reference = HubMPQ.from_pretrained(folder)
    mpq = HubMPQ.from_pretrained(folder, runtime="auto")
    x = noise(4, 3, 32, 32)
    assert mpq.model.runtime_layers.runtime in ("torch", "onednn")
    with torch.no_grad():
        assert mpq(x).shape == reference(x).shape
    batches = [(x, torch.arange(4) % 7)]
    assert mpq.evaluate(batches)["samples"] == 4
    assert HubMPQ.from_pretrained(folder, runtime="torch")(x).equal(reference(x))


def test_what_only_runs_is_neither_trained_nor_saved(folder, tmp_path):
    mpq = HubMPQ.from_pretrained(folder, runtime="auto")
    batches = [(noise(4, 3, 32, 32), torch.arange(4) % 7)]
    for refused in (
        lambda: mpq.save_pretrained(tmp_path / "again"),
        lambda: mpq.push_to_hub("me/again"),
        lambda: mpq.export(tmp_path / "onnx", "onnx"),
        lambda: mpq.finetune(batches, epochs=1),
        lambda: mpq.to_runtime("torch"),
    ):
        with pytest.raises(HubMPQError, match=r"loaded with runtime='(onednn|torch)' is inference-only"):
            refused()


def test_runtime_is_of_packed_models(folder):
    with pytest.raises(
        InvalidArgument, match="runtime= is only for packed models, and no packed model was found as 'resnet18'"
    ):
        HubMPQ.from_pretrained("resnet18", pretrained=False, runtime="auto")
    with pytest.raises(InvalidArgument, match="unknown runtime 'fast'"):
        HubMPQ.from_pretrained(folder, runtime="fast")


def test_evaluate_on_a_runtime(folder, tmp_path):
    from PIL import Image

    for i in range(7):
        (tmp_path / "images" / f"c{i}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (30 * i, 0, 90)).save(tmp_path / "images" / f"c{i}" / "a.png")
    found = {}
    for name in ("torch", "onednn"):
        if runtimes.get(name).available() is not None:
            continue
        command = ["evaluate", str(folder), "--data", str(tmp_path / "images"), "--runtime", name, "--json"]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        found[name] = json.loads(done.stdout)
        assert found[name]["runtime"] == name
    assert found["torch"]["integer_layers"] == 0


def test_a_certificate_with_labels_and_without(folder):
    mpq = HubMPQ.from_pretrained(folder)
    module = mpq.to_runtime("auto", example=noise(4, 3, 32, 32))
    x = noise(64, 3, 32, 32)
    labelled = [(x, mpq(x).argmax(-1))]
    found = mpq.certify(module, labelled)
    assert found.metrics["reference"]["top1"] == 100
    assert found.metrics["runtime"]["top1"] > 80
    alone = mpq.certify(module, [x])
    assert alone.metrics["reference"]["agreement"] == 100
    assert set(alone.layers) == set(module.runtime_layers.integer)
    assert json.loads(json.dumps(alone.to_json())) == alone.to_json()
    assert mpq.history["runtimes"][found.runtime]["integer layers"] == len(found.layers)
    with pytest.raises(InvalidArgument, match="expected a module made by to_runtime"):
        mpq.certify(mpq.model, labelled)


def test_the_card_holds_what_was_certified(folder, tmp_path):
    from hub_mpq.hub.card import CardFacts, render_card
    from hub_mpq.pack import read_manifest

    mpq = HubMPQ.from_pretrained(folder)
    mpq.certify(mpq.to_runtime("auto"), [noise(8, 3, 32, 32)])
    mpq.save_pretrained(tmp_path / "certified")
    manifest = read_manifest(tmp_path / "certified" / "model.mpq.safetensors")
    card = render_card("me/model", manifest, CardFacts({"model.mpq.safetensors": 1000}))
    name = next(iter(mpq.history["runtimes"]))
    assert f"| runtime {name} |" in card
    assert "largest error of a layer" in card
    assert HubMPQ.from_pretrained(tmp_path / "certified").history["runtimes"].keys() == {name}
    mpq.finetune([(noise(4, 3, 32, 32), torch.arange(4) % 7)], epochs=1)
    assert "runtimes" not in mpq.history


BOUNDS = [
    (LayerCheck(error=2e-5, wrong=1), {}, "layer 'a' has 1 wrong values"),
    (LayerCheck(flips=11, codes=10_000), {}, "layer 'a' has 1.1e-03 of its codes off by one step"),
    (LayerCheck(flips=10, codes=10_000), {}, None),
    (LayerCheck(flips=1, codes=10), {}, None),
    (LayerCheck(), {"reference": {"top1": 60.0, "samples": 2000}, "runtime": {"top1": 60.2}}, "top1 is 60.2"),
    (LayerCheck(), {"reference": {"top1": 60.0, "samples": 2000}, "runtime": {"top1": 60.1}}, None),
    (LayerCheck(), {"reference": {"top1": 60.0, "samples": 100}, "runtime": {"top1": 59.0}}, None),
    (LayerCheck(), {"reference": {"top1": 60.0, "samples": 100}, "runtime": {"top1": 58.0}}, "top1 is 58"),
    (LayerCheck(), {"reference": {"mse": 2.0, "samples": 9}, "runtime": {"mse": 2.003}}, "mse is 2.003"),
    (LayerCheck(), {"reference": {"mse": 2.0, "samples": 9}, "runtime": {"mse": 2.001}}, None),
]


@pytest.mark.parametrize(("check", "metrics", "reason"), BOUNDS)
def test_the_bounds_of_a_certificate(check, metrics, reason):
    found = certificate(RuntimeLayers("mine", ("a",)), {"a": check}, metrics)
    assert found.exact == (reason is None)
    assert reason is None or reason in found.reasons[0]
    assert isinstance(found, Certificate)


def test_a_layer_that_was_not_seen_is_not_certified():
    assert "layer 'b' did not run" in certificate(RuntimeLayers("mine", ("a", "b")), {"a": LayerCheck()}).reasons[0]


class Mine(Runtime):
    """A runtime of someone else's."""

    name = "mine"

    def menu(self, layer):
        return ()

    def build(self, model, example):
        from hub_mpq.adapters.restore_state import copied

        net = copied(model)
        return net, RuntimeLayers("mine", (), {})

    def observe(self, module, batch):
        return ()


def test_a_runtime_of_ones_own():
    register_runtime(Mine())
    try:
        batch = tokens()
        mpq = quantized(bert(), "W4A8", batch)
        module = mpq.to_runtime("mine")
        assert torch.equal(module(**batch).logits, mpq(**batch).logits)
    finally:
        runtimes.unregister("mine")


def test_generation_is_refused_where_there_is_none():
    from transformers import LlamaConfig, LlamaForCausalLM

    register_runtime(Mine())
    try:
        config = LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=60
        )
        batch = {"input_ids": tokens()["input_ids"]}
        module = quantized(LlamaForCausalLM(config).eval(), "W6A8", batch).to_runtime("mine")
        with pytest.raises(HubMPQError, match=r"runtime 'mine' does not support generate\(\); use 'torch' or 'onednn'"):
            module.generate(batch["input_ids"], max_new_tokens=2)
    finally:
        runtimes.unregister("mine")


def test_a_network_of_ones_own_runs_as_one_graph(net, tmp_path):
    """Its packed file does not hold an example input."""
    x = noise(8, 1, 8, 8)
    quantized(net, "W4A4", x).save_pretrained(tmp_path / "packed")
    mpq = HubMPQ.from_pretrained(tmp_path / "packed", module=net, runtime="auto")
    assert mpq.model.runtime_layers.runtime == "torch" or hasattr(mpq.model, "graph")
    want = HubMPQ.from_pretrained(tmp_path / "packed", module=net)(x)
    assert (mpq(x) - want).norm() < 0.05 * want.norm()


def test_a_network_whose_input_is_not_known_has_its_layers_exchanged(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, y):
            return self.b(self.a(x).relu() + y)

    net, x = Two().eval(), noise(4, 6)
    first = HubMPQ.from_module(net, (x[:1], x[:1])).apply_policy("W4A4", [((x, x),)])
    first.save_pretrained(tmp_path / "packed")
    mpq = HubMPQ.from_pretrained(tmp_path / "packed", module=net, runtime="auto")
    want = HubMPQ.from_pretrained(tmp_path / "packed", module=net)(x, x)
    assert (mpq(x, x) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_train_does_not_move_what_is_shared_with_the_reference(name):
    if runtimes.get(name).available() is not None:
        pytest.skip(runtimes.get(name).available())

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x) if x.sum() > -1e9 else x))

    x = noise(8, 6)
    mpq = quantized(Untraceable().eval(), "W6A8", x)
    before = mpq(x)
    module = copy.deepcopy(mpq.to_runtime(name))
    assert module.train() is module
    assert not any(part.training for part in module.modules())
    module(x + 3)
    assert torch.equal(mpq(x), before)


def test_what_runs_is_not_saved():
    module = quantized(bert(), "W4A8", tokens()).to_runtime("torch")
    with pytest.raises(HubMPQError, match="a module of runtime 'torch' cannot be saved"):
        module.save_pretrained("anywhere")
