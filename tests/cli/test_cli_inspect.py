"""inspect: from a name or a config, without weights and without network."""

from __future__ import annotations

import json

from transformers import MixtralConfig, ViTConfig


def test_resnet18_without_weights_or_network(run, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("inspect reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = run("inspect", "resnet18", "--json")
    tree = json.loads(result.stdout)
    assert result.exit_code == 0
    assert len(tree["layers"]) == 21
    assert round(tree["levels"]["W4A4"]["bitops"] / 1e9, 3) == 34.714  # stem and head at 8 bits
    assert round(tree["macs"] / 1e9, 3) == 1.814


def test_levels_are_a_table_in_the_order_of_the_limits(run):
    lines = run("inspect", "test_resnet").stdout.rpartition("\n\n")[2].splitlines()
    tree = json.loads(run("inspect", "test_resnet", "--json").stdout)
    assert lines[1].split() == ["level", *tree["levels"]["W4A4"]]
    assert [line.split()[0] for line in lines[3:]] == ["W8A8", "W4A4", "W2A2"]
    assert "1.778 G  329.048 KB        6.63x" in lines[4]


def test_float_work_is_named_with_its_reason(run):
    result = run("inspect", "vit_small_patch16_224", "--exclude", "blocks.0.mlp.fc1")
    assert "stays float: blocks.0.attn" in result.stdout
    assert "stays float: blocks.0.mlp.fc1 (excluded" in result.stdout


def test_a_config_folder(run, tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    tree = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert tree["library"] == "transformers"
    assert len(tree["layers"]) == 8  # patches, q, k, v, output, two of the MLP, classifier


def test_pins_and_input_size(run):
    tree = json.loads(run("inspect", "resnet18", "--pin", "conv1=none", "--input-size", "64x96", "--json").stdout)
    assert tree["input_shape"] == [3, 64, 96]
    assert tree["layers"][0]["fixed"] is None


def test_a_packed_folder_by_its_header(run, packed, monkeypatch):
    import hub_mpq.adapters

    monkeypatch.setattr(hub_mpq.adapters, "load", None)  # not even the skeleton is built
    tree = json.loads(run("inspect", packed, "--json").stdout)
    assert tree["usage"]["size"] == (packed / "model.mpq.safetensors").stat().st_size
    assert set(tree["policy"]["bits"]) == {row["name"] for row in tree["layers"]}
    assert "conv1.3" in run("inspect", packed).stdout
    for option in (["--pin", "fc=none"], ["--exclude", "fc"], ["--target", "gguf"], ["--per-expert"]):
        refused = run("inspect", packed, *option)
        assert refused.exit_code == 2
        assert f"{option[0]} cannot be used with the packed model" in refused.stderr


def test_experts_one_by_one(run, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
    MixtralConfig(
        vocab_size=48, num_hidden_layers=1, num_local_experts=4, architectures=["MixtralForCausalLM"], **sizes
    ).save_pretrained(tmp_path)
    trees = [json.loads(run("inspect", tmp_path, "--json", *more).stdout) for more in ((), ("--per-expert",))]
    names = [[layer["name"] for layer in tree["layers"] if ".experts." in layer["name"]] for tree in trees]
    assert names[1] == [f"{stack}.{i}" for stack in names[0] for i in range(4)]
    assert trees[0]["macs"] == trees[1]["macs"]
