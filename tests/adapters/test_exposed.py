"""Layers whose weight a model of timm or transformers reads without calling them: quantized as one layer each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import LayerGraph
from hub_mpq.nn.quantize import quantized_layers

TIMM = {
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "beitv2_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "eva_giant_patch14_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (1, 2),
        "num_heads": (1, 2),
    },
    "vit_base_patch16_siglip_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resnet18": {"num_classes": 9},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def quantized_share(graph: LayerGraph) -> float:
    """Of the MACs that multiply a weight."""
    rest = sum(op.macs for op in graph.floats if op.kind not in ("attention", "matmul"))
    inside = sum(layer.macs for layer in graph)
    return inside / (inside + rest)


def timm_model(name: str) -> Any:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **TIMM[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def with_plain_bias(model: Any) -> Any:
    """The same network, the biases of query, key and value in their layer, which is then called."""
    for module in model.modules():
        if getattr(module, "q_bias", None) is not None:
            bias = torch.cat([module.q_bias, module.k_bias, module.v_bias]).detach()
            module.qkv.bias = nn.Parameter(bias)
            module.q_bias = None
    return model


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_are_quantized_whole(name):
    model = timm_model(name)
    mpq = HubMPQ.from_module(model, IMAGES[:1])
    with torch.no_grad():
        torch.testing.assert_close(mpq.model(IMAGES), model(IMAGES), atol=1e-6, rtol=1e-5)
    assert quantized_share(mpq.graph) >= 0.95
    assert not [op.name for op in mpq.graph.floats if op.name.endswith("qkv")]
    if "qkv" in str(mpq.graph.names):  # the user's own is as it was
        assert not any(getattr(module, "qkv_bias_separate", False) for module in model.modules())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("level", ["W3A5", "W4A32"])
def test_timm_models_compute_and_learn_what_layers_do(name, level):
    ours = HubMPQ.from_module(timm_model(name), IMAGES[:1])
    plain = HubMPQ.from_module(with_plain_bias(timm_model(name)), IMAGES[:1])
    assert [(x.name, x.macs, x.weight_shape) for x in ours.graph] == [
        (x.name, x.macs, x.weight_shape) for x in plain.graph
    ]
    outs, grads = [], []
    for mpq in (ours, plain):
        mpq.apply_policy(level, [IMAGES])
        out = mpq.model(IMAGES)
        out.square().mean().backward()
        outs.append(out)
        grads.append({n: p.grad for n, p in mpq.model.named_parameters() if "qkv" in n and not n.endswith("bias")})
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    assert grads[0].keys() == grads[1].keys()
    assert any("weight_quantizer" in name for name in grads[0])
    for key in grads[0]:
        torch.testing.assert_close(grads[0][key], grads[1][key], atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_a_folder_of_timm_is_loaded_to_the_bit(name, tmp_path):
    mpq = HubMPQ.from_pretrained(name, pretrained=False, num_classes=5, **TIMM[name])
    mpq.apply_policy("W3A5", [IMAGES])
    mpq.save_pretrained(tmp_path)
    import transformers

    with torch.no_grad():
        want = mpq(IMAGES)
        assert torch.equal(HubMPQ.from_pretrained(tmp_path)(IMAGES), want)
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        for model in (wrapped, copy.deepcopy(wrapped)):
            assert torch.equal(model(IMAGES).logits, want)


def wavlm() -> Any:
    import transformers

    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stem = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    more = {
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "num_buckets": 16,
        "max_bucket_distance": 20,
    }
    torch.manual_seed(0)
    model = transformers.WavLMModel(transformers.WavLMConfig(**layers, **stem, **more)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_wavlm_computes_what_its_own_function_does():
    model = wavlm()
    sound = {"input_values": torch.randn(2, 1600), "attention_mask": torch.ones(2, 1600, dtype=torch.long)}
    sound["attention_mask"][1, 900:] = 0
    mpq = HubMPQ.from_module(model, sound)
    with torch.no_grad():
        want, found = (net(**sound, output_attentions=True) for net in (model, mpq.model))
    torch.testing.assert_close(found.last_hidden_state, want.last_hidden_state, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.attentions, want.attentions, atol=1e-6, rtol=1e-5)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer = mpq.graph[f"encoder.layers.1.attention.{name}"]
        assert layer.kind == "projection"
        assert layer.activation_tie == (None if name == "out_proj" else "encoder.layers.1.attention.q_proj")
    assert type(model.encoder.layers[0].attention).__name__ == "WavLMAttention"  # the user's own is as it was
    mpq.apply_policy("W4A8", [sound])
    with torch.no_grad():
        quantized = mpq.model(**sound).last_hidden_state
        assert 0.5 < torch.cosine_similarity(quantized.flatten(), want.last_hidden_state.flatten(), 0) < 1 - 1e-6
        again = copy.deepcopy(mpq.model)
        assert torch.equal(again(**sound).last_hidden_state, quantized)
    assert {"encoder.layers.0.attention.v_proj"} <= {name for name, _ in quantized_layers(mpq.model)}


def test_mamba_says_why_a_layer_stays_float():
    """Its time steps' layer is read as a matrix, and its convolution by a function."""
    import transformers

    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=99, hidden_size=64, state_size=8, num_hidden_layers=2)
    )
    graph = HubMPQ.from_module(model.eval(), {"input_ids": torch.arange(8)[None]}).graph
    reasons = {op.name.rpartition(".")[2]: op.reason for op in graph.floats if op.weight_count}
    assert reasons["dt_proj"] == "its weight is used outside its own forward"
    assert quantized_share(graph) >= 0.95


MIXERS = {
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "falcon_h1": (
        "FalconH1",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 16},
            **{"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
        },
    ),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_no_kernel_reads_the_weights_of_quantized_layers_in_training(kind, monkeypatch):
    """Where kernels are installed, mixers hand them all weights while they train."""
    import importlib

    import transformers

    name, values = MIXERS[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, use_cache=False, **values
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = {"input_ids": torch.arange(8)[None]}
    home = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    read = []
    for kernel in ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined"):
        if hasattr(home, kernel):
            monkeypatch.setattr(home, kernel, lambda *args, **kwargs: read.append(args))
    model.train()(**ids)
    assert read  # the user's own does
    read.clear()
    mpq = HubMPQ.from_module(model.eval(), ids)
    mpq.apply_policy("W4A8", [ids])
    for net in (mpq.model, copy.deepcopy(mpq.model)):
        net.train()(**ids).logits.square().mean().backward()
        assert all(module.training for module in net.modules())
        grads = {n for n, p in net.named_parameters() if p.grad is not None and "out_proj.weight_quantizer" in n}
        assert grads
    assert not read
    with pytest.raises(Exception, match=r".+"):
        mpq.model(input_ids=torch.full((1, 8), 1000))
    assert all(module.training for module in mpq.model.modules())


class Reads(nn.Module):
    """A weight that is used in ways that no layer stands for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.head = how, nn.Linear(6, 6), nn.Linear(6, 2)
        self.matrix, self.positions = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions
        if self.how == "called too":
            x = self.fc(x)
        if self.how == "a Parameter":
            return self.head(x @ self.matrix)
        weight = self.fc.weight + self.matrix if self.how == "changed" else self.fc.weight
        return self.head(nn.functional.linear(x, weight, self.fc.bias))


@pytest.mark.parametrize(
    ("how", "name", "reason"),
    [
        ("read", "fc", "its weight is used outside its own forward"),
        ("called too", "fc", "its weight is used outside its own forward"),
        ("changed", "fc", "its weight is used outside its own forward"),
        ("a Parameter", "matrix", "Reads multiplies by its 2-D Parameter matrix and has no quantized form"),
    ],
)
def test_what_is_read_in_another_way_stays_float_and_says_so(how, name, reason):
    graph = HubMPQ.from_module(Reads(how), torch.randn(1, 3, 6)).graph
    assert graph.names == ("head",)
    assert {op.reason for op in graph.floats if op.name == name} == {reason}


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recurrent_layers_count_and_say_why(make, device):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = make(6, 8, batch_first=True, bidirectional=True), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    net = Net().to(device)
    graph = HubMPQ.from_module(net, torch.randn(1, 5, 6, device=device)).graph
    (row,) = (op for op in graph.floats if op.name == "rnn")
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[make]
    assert row.macs == 5 * 2 * gates * 8 * (6 + 8)
    assert row.weight_count == 2 * gates * 8 * (6 + 8)
    assert row.reason == "recurrent layers have no quantized form: one operator reads all of their weights"
