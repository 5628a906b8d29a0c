"""timm models without weights, against known counts."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hub_mpq import HubMPQ
from hub_mpq.adapters import from_module, load, norm_of
from hub_mpq.core import LayerBits
from hub_mpq.core.library import libraries
from hub_mpq.cost import level_bitops
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.export.float_copy import float_copy_state


def macs(graph):
    return sum(layer.macs for layer in graph), sum(op.macs for op in graph.floats)


def test_resnet18_bitops_are_the_published_ones():
    graph = load("resnet18", meta=True).graph
    assert len(graph) == 21
    assert {layer.name: layer.fixed for layer in graph if layer.fixed} == dict.fromkeys(
        ("conv1", "fc"), LayerBits(8, 8)
    )
    assert graph.input_shape == (3, 224, 224)
    assert graph["layer2.0.downsample.0"].macs == 28 * 28 * 64 * 128
    assert level_bitops(graph, "W4A4") == 34_714_419_200
    assert level_bitops(graph, "W3A3") == 22_845_587_456
    assert graph.floats == ()
    # 20 norms of 4 float32 vectors and a counter, and the bias of fc
    assert graph.other_bytes == 4800 * 4 * 4 + 20 * 8 + 4000


@pytest.mark.parametrize(
    ("name", "layers", "modules", "attention"),
    [
        ("resnet50", 54, 4_089_184_256, 0),
        ("mobilenetv2_100", 53, 300_774_272, 0),
        ("vit_small_patch16_224", 50, 4_241_218_560, 12 * 2 * 197 * 197 * 384),
    ],
)
def test_known_counts(name, layers, modules, attention):
    graph = load(name, meta=True).graph
    assert len(graph) == layers
    assert macs(graph) == (modules, attention)


FAMILIES = {
    "convnext_atto": 1,
    "efficientnet_b0": 1,
    "densenet121": 1,
    "regnety_002": 1,
    "mobilenetv3_small_050": 1,
    "ghostnet_050": 1,
    "mixer_s32_224": 1,
    "inception_v3": 1,
    "levit_128s": 2,
    "deit_tiny_distilled_patch16_224": 2,
    "swin_tiny_patch4_window7_224": 1,
    "mobilevit_xxs": 1,
    "beit_base_patch16_224": 1,
    "swinv2_tiny_window8_256": 1,
    "resnetv2_50x1_bit": 1,
    "nfnet_l0": 1,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_is_counted_once(name):
    """All layers and float work together are what torch's own flop counter sees, and each head is found."""
    source = load(name, meta=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source.model.eval()(*source.example)
    assert 2 * sum(macs(source.graph)) == counter.get_total_flops()
    heads = [layer.name for layer in source.graph if layer.fixed][-FAMILIES[name] :]
    assert all(source.graph[head].weight_shape[0] == 1000 for head in heads)
    assert all(op.reason for op in source.graph.floats)


def test_hard_layers_stay_float_and_say_why():
    floats = {op.name: op for op in load("sequencer2d_s", meta=True).graph.floats}
    lstm = floats["stages.0.blocks.0.rnn_tokens.rnn_v"]
    assert lstm.kind == "LSTM"
    assert lstm.macs == 32 * 32 * 2 * 4 * 48 * (192 + 48)
    assert "recurrent" in lstm.reason


def test_the_layer_of_queries_keys_and_values_is_quantized():
    graph = load("beit_base_patch16_224", meta=True).graph
    assert graph["blocks.0.attn.qkv"].macs == 197 * 768 * 2304
    assert not [op for op in graph.floats if op.weight_count]


def test_norms_of_timm():
    for name, norms in {"resnet18": 20, "mobilenetv2_100": 52, "efficientnet_b0": 49}.items():
        source = load(name, meta=True)
        found = norm_of(source.model, source.example)
        assert len(found) == norms == len(set(found.values()))
    assert found["blocks.0.0.bn1"] == "blocks.0.0.conv_dw"


def test_mobilenet_v1_is_quantized_whole():
    """Strided convolutions are Conv2dSame."""
    from timm.models.efficientnet import _gen_mobilenet_v1

    net = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.75, pad_type="same", bn_eps=1e-3)
    source = from_module(net, torch.randn(2, 3, 224, 224))
    same = {name for name, m in net.named_modules() if type(m).__name__ == "Conv2dSame"}
    assert len(same) == 5
    assert same < set(source.graph.names)
    assert len(source.graph) == 28
    assert source.graph.floats == ()
    assert source.graph["conv_stem"].macs == 112 * 112 * 27 * 24
    # width multiplier 0.75 at 224: 325 million multiply-adds (Howard et al., 2017, table 6)
    assert round(macs(source.graph)[0] / 1e6) == 325
    assert [layer.name for layer in source.graph if layer.fixed] == ["conv_stem", "classifier"]
    assert len(norm_of(net, source.example)) == 27
    assert (source.library, source.model_id, source.config) == ("module", "EfficientNet", {})


def test_model_arguments_example_and_config():
    source = load("resnet18", pretrained=False, num_classes=10, in_chans=1)
    assert source.graph["fc"].weight_shape == (10, 512)
    assert source.example[0].shape == (1, 1, 224, 224)
    assert source.config["architecture"] == "resnet18"
    assert "num_classes" not in source.config["model_args"]
    assert source.preprocess["input_size"][0] == 1
    assert load("vit_tiny_patch16_224", meta=True, img_size=96).graph.input_shape == (3, 96, 96)
    assert load("resnet18", meta=True, input_size=(3, 64, 64)).graph.input_shape == (3, 64, 64)
    bare = load("resnet18", meta=True, num_classes=0).graph
    assert [layer.name for layer in bare if layer.fixed] == ["conv1"]


def test_a_saved_folder_loads_again(tmp_path):
    source = load("test_resnet", pretrained=False, num_classes=7)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    assert load(str(tmp_path), pretrained=False).graph.digest == source.graph.digest
    with pytest.raises(HubMPQError, match="No suitable checkpoints"):
        load(str(tmp_path))
    save_file(source.model.state_dict(), tmp_path / "model.safetensors")
    for again in (
        load(str(tmp_path)),
        load("test_resnet", num_classes=7, checkpoint_path=tmp_path / "model.safetensors"),
    ):
        assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in source.model.state_dict().items())


SIZES = [
    ("test_resnet", {"input_size": (3, 64, 64)}),
    ("test_resnet", {"in_chans": 1, "input_size": (1, 48, 80)}),
    ("test_vit", {"img_size": 96}),
    ("test_vit", {"img_size": (96, 64)}),
    ("test_vit", {"img_size": 64, "dynamic_img_size": True}),
    ("test_vit", {"input_size": (3, 96, 96), "dynamic_img_size": True}),
    ("test_vit", {"reg_tokens": 2}),
    ("test_efficientnet", {"in_chans": 1}),
    ("test_resnet", {"global_pool": "", "num_classes": 0, "input_size": (3, 32, 32)}),
]


@pytest.mark.parametrize(("name", "given"), SIZES)
def test_the_input_size_that_a_model_was_given_is_saved(name, given, tmp_path):
    mpq = HubMPQ.from_pretrained(name, pretrained=False, **given)
    shape = mpq.graph.input_shape
    assert shape[-2:] == tuple(given["input_size"][1:]) if "input_size" in given else True
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    mpq.apply_policy("W4A8", [x])
    mpq.save_pretrained(tmp_path / "first")
    again = HubMPQ.from_pretrained(tmp_path / "first")
    assert again.graph.input_shape == shape
    assert again.source.example[0].shape == (1, *shape)
    assert tuple(libraries.get("timm").image_preprocess(again.source)["input_size"]) == shape
    assert again.usage().amounts == mpq.usage().amounts
    with torch.no_grad():
        assert torch.equal(again.model(x), mpq.model.eval()(x))
    again.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("first", "second"))
    assert first.get("model_args") == second.get("model_args")
    assert all(first["pretrained_cfg"][k] == second["pretrained_cfg"][k] for k in ("input_size", "fixed_input_size"))

    # timm alone, with the float copy
    (tmp_path / "first" / "model.mpq.safetensors").unlink()
    save_file(float_copy_state(mpq.model, libraries.get("timm")), tmp_path / "first" / "model.safetensors")
    net = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True).eval()
    for test in (False, True):
        assert tuple(timm.data.resolve_model_data_config(net, use_test_size=test)["input_size"]) == shape
    net(x)
    assert load(str(tmp_path / "first")).graph.input_shape == shape


def test_a_model_that_takes_other_sizes_than_timm_says_is_built_as_it_was():
    config = load("xcit_nano_12_p16_224", meta=True, input_size=(3, 64, 64)).config
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["fixed_input_size"] is False
    assert config["model_args"]["img_size"] == [224, 224]


def test_a_folder_that_does_not_tell_its_input_size_has_that_of_its_packed_file(tmp_path):
    mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 64, 64)).apply_policy("W8A8")
    mpq.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 160, 160]  # as hub_mpq wrote it once
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = HubMPQ.from_pretrained(tmp_path)
    assert again.source.example[0].shape == (1, 3, 64, 64)
    assert again.source.config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_a_packed_model_that_is_given_another_input_size_counts_at_that(tmp_path):
    def fresh(size):
        return HubMPQ.from_pretrained(
            "test_resnet",
            pretrained=False,
            input_size=(3, size, size),
            exclude=["layer2.0.conv2"],
            fixed={"conv1.0": None},
        )

    mpq = fresh(64).apply_policy("W4A6")
    mpq.save_pretrained(tmp_path)
    again, other = HubMPQ.from_pretrained(tmp_path, input_size=(3, 96, 96)), fresh(96)
    assert again.graph.input_shape == (3, 96, 96)
    assert again.usage().amounts == {**other.apply_policy("W4A6").usage().amounts, "size": again.usage()["size"]}
    assert {op.name: op.macs for op in again.graph.floats} == {op.name: op.macs for op in other.graph.floats}
    assert again.graph.floats


def test_what_timm_does_not_have():
    with pytest.raises(HubMPQError, match=r"cannot download .*'resnet81'; check the name .did you mean resnet18"):
        load("resnet81")
    with pytest.raises(InvalidArgument, match=r"timm has no model 'mobilenetv2_1oo'; did you mean .*mobilenetv2_100"):
        load("mobilenetv2_1oo", library="timm")
    with pytest.raises(
        HubMPQError, match=r"cannot download the weights of 'resnet18'.*pretrained=False.*checkpoint_path="
    ):
        load("resnet18")
    with pytest.raises(HubMPQError, match=r"cannot download the weights of 'timm/resnet18.a1_in1k'"):
        load("timm/resnet18.a1_in1k")
    with pytest.raises(InvalidArgument, match=r"checkpoint_path not found: 'missing\.pth'"):
        load("resnet18", checkpoint_path="missing.pth")
    with pytest.raises(InvalidArgument, match="unexpected keyword argument 'colour'"):
        load("resnet18", pretrained=False, colour=3)
    with pytest.raises(InvalidArgument, match="requires a Hub id"):
        load("resnet18", pretrained=False, revision="main")


def test_from_module_refuses_what_is_no_network():
    with pytest.raises(InvalidArgument, match=r"expects an nn\.Module"):
        from_module("resnet18", torch.zeros(1))
    with pytest.raises(InvalidArgument, match="contains no tensor"):
        from_module(nn.Linear(2, 2), ())
