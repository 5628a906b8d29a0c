"""Each mistake gets one sentence and a non-zero exit, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_toys import LOADING, MODEL, SKELETON, images


def refused(result, *words):
    """One sentence on stderr that says these words, exit code 2, nothing on stdout. What has begun to train said so."""
    assert result.exit_code == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "hub-mpq: 1 process"))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("hub-mpq: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in; `untouched` proves that it stays empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(*more):
    return ["quantize", *MODEL, *LOADING, "--output", "out", "--steps", "1", "--indicator-steps", "1", *more]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bitops", "34"], ["bitops", "no unit"]),
        (["--bitops", "nonsense"], ["bitops", "nonsense"]),
        (["--bitops", "W9A4"], ["9"]),
        (["--bitops", "Wide"], ["Wide"]),
        (["--bitops", "-1G"], ["-1G"]),
        (["--size", "4 bananas"], ["unknown unit 'bananas'"]),
        (["--compression", "much"], ["compression", "much"]),
        ([], ["no budget"]),
        (["--bitops", "1K"], ["(minimum "]),
        (["--size", "10KB"], ["size <= 10000", "(minimum "]),
        (["--weight-bits", "1.5"], ["weight_bits <= 1.5", "minimum 2)"]),
        (["--compression", "20x"], ["compression >= 20", "maximum 15."]),
        (["--activation-memory", "1KB"], ["activation_memory <= 1000", "(minimum "]),
        (["--bitops", "W4A4", "--candidates", "0,2"], ["1 to 8", "0"]),
        (["--bitops", "W4A4", "--candidates", "4,9"], ["--candidates: ", "1 to 8", "9"]),
        (["--bitops", "W4A4", "--candidates", "few"], ["candidates", "few"]),
        (["--bitops", "W4A4", "--pin", "layer9.*=W4A4"], ["layer9.*", "matches none"]),
        (["--bitops", "W4A4", "--pin", "fc"], ["PATTERN=W8A8"]),
        (["--bitops", "W4A4", "--pin", "fc=8"], ["--pin fc=8: '8' is not a valid bit-width level"]),
        (["--bitops", "W4A4", "--exclude", "nothing*"], ["nothing*"]),
        (["--bitops", "W4A4", "--plot", "policy.txt"], ["policy.txt"]),
        (["--bitops", "W4A4", "--indicators", "none.safetensors"], ["none.safetensors"]),
        (["--bitops", "W4A4", "--checkpoint-path", "none.safetensors"], ["none.safetensors"]),
        (["--bitops", "W4A4", "--class-map", "none.txt"], ["none.txt"]),
        (["--bitops", "W4A4", "--model-arg", "colour=red"], ["colour"]),
    ],
)
def test_quantize_refuses(run, here, folder, more, words):
    refused(run(*quantize("--data", folder, *more)), *words)
    assert os.listdir(here) == []


def test_a_model_without_a_layer_to_quantize(run, here, folder):
    model = [*quantize("--bitops", "W4A4", "--data", folder), "--exclude", "*"]
    refused(run(*model), "no layer of", "can be quantized", "excluded by the user")
    assert not list(here.iterdir())
    assert run("inspect", *SKELETON, "--exclude", "*").exit_code == 0


def test_a_bad_budget_costs_no_model_and_no_training(run, here, folder, monkeypatch):
    import hub_mpq.cli.models
    import hub_mpq.model

    monkeypatch.setattr(hub_mpq.model, "train_scores", None)
    refused(run(*quantize("--data", folder, "--bitops", "1K")), "(minimum ")
    monkeypatch.setattr(hub_mpq.cli.models, "load", None)
    refused(run(*quantize("--bitops", "34")), "no unit")


@pytest.mark.parametrize("command", ["inspect", "evaluate", "search", "quantize"])
def test_unknown_model_with_suggestions(run, here, folder, command):
    more = {
        "inspect": [],
        "evaluate": ["--data", folder],
        "search": ["--bitops", "W4A4"],
        "quantize": ["--bitops", "W4A4", "--output", "out"],
    }[command]
    refused(run(command, "resnet19", *more), "resnet19", "did you mean", "resnet18")
    assert os.listdir(here) == []


def test_missing_and_empty_data(run, here, folder):
    refused(run(*quantize("--bitops", "W4A4", "--data", "nowhere")), "nowhere")
    Path("empty").mkdir()
    refused(run(*quantize("--bitops", "W4A4", "--data", "empty")), "no images")
    (Path("empty") / "class0").mkdir()
    refused(run("evaluate", *MODEL, "--data", "empty"), "no images")
    assert sorted(os.listdir(here)) == ["empty"]


def test_labels_that_cannot_be_known(run, here, folder):
    images(Path("two"), classes=2, count=2)
    refused(run("evaluate", *MODEL, "--data", "two", *LOADING), "2 class folders", "3 classes", "--class-map")
    Path("map.txt").write_text("class1\nclass7\n")
    refused(run("evaluate", *MODEL, "--data", "two", "--class-map", "map.txt", *LOADING), "class0", "class map")
    shutil.copy("two/class0/0.png", "two/0.png")
    refused(run("evaluate", *MODEL, "--data", "two", *LOADING), "images and class folders")
    images(Path("sets/train"), classes=3, count=1)
    Path("sets/val").mkdir()
    refused(run("evaluate", *MODEL, "--data", "sets", *LOADING), "sets/train")


def test_unlabelled_images_have_no_accuracy(run, here, folder, packed):
    shutil.copytree(folder / "class0", "plain")
    refused(run("evaluate", packed, "--data", "plain", *LOADING), "no labels")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_broken_image_is_named(run, here, folder, workers):
    shutil.copytree(folder, "data")
    Path("data/class1/3.png").write_bytes(b"no image at all")
    refused(run("evaluate", *MODEL, "--data", "data", "--workers", workers), "data/class1/3.png")
    if workers == "0":
        refused(run(*quantize("--bitops", "W4A4", "--data", "data")), "data/class1/3.png")
    assert os.listdir(here) == ["data"]


def test_text_models_take_no_images(run, here, folder):
    from transformers import BertConfig

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained("bert")
    refused(
        run("evaluate", "bert", "--no-pretrained", "--data", folder),
        "require a causal language model, got BertForSequenceClassification",
        "Python",
    )


def test_policy_for_another_model(run, here, folder, indicators):
    result = run("search", *SKELETON, "--indicators", indicators, "--bitops", "W4A4", "--json")
    Path("policy.json").write_text(result.stdout)
    other = ["test_efficientnet", *MODEL[1:], "--data", folder, "--output", "out"]
    refused(run("finetune", *other, "--policy", "policy.json"), "another model", "conv1.0")
    refused(run("finetune", *other, "--policy", "W4B4"), "W4B4")
    refused(run("finetune", *other), "--policy")
    Path("policy.json").write_text("[1, 2]")
    refused(run("finetune", *other, "--policy", "policy.json"), "policy.json")
    refused(run("search", "test_efficientnet", *SKELETON[1:], "--indicators", indicators, "--bitops", "W4A4"), "layer")
    assert os.listdir(here) == ["policy.json"]


def test_damaged_packed_folders(run, here, folder, packed):
    shutil.copytree(packed, "model")
    file = Path("model/model.mpq.safetensors")
    whole = file.read_bytes()
    evaluate, look = ["evaluate", "model", "--data", folder, *LOADING], ["inspect", "model"]
    for cut in (0, 7, 500, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(run(*evaluate), str(file))
        if cut < 1000:
            refused(run(*look), str(file))
    flipped = bytearray(whole)
    flipped[-10] ^= 4
    file.write_bytes(bytes(flipped))
    refused(run(*evaluate), str(file))
    assert b'"format_version":"1"' in whole
    file.write_bytes(whole.replace(b'"format_version":"1"', b'"format_version":"9"'))
    refused(run(*evaluate), "format version 9")
    refused(run(*look), "format version 9")


def test_solve_refuses_bad_tables(run, here):
    refused(run("solve", "none.json"), "none.json")
    Path("table.json").write_text("{")
    refused(run("solve", "table.json"), "table.json", "JSON")
    Path("table.json").write_text("[]")
    refused(run("solve", "table.json"), "table")
    layers = {"a": {"x": {"score": 1.0, "cost": {"bytes": 5}}}}
    Path("table.json").write_text(json.dumps({"sense": "min", "layers": layers, "limits": {"bytes": 4}}))
    refused(run("solve", "table.json"), "(minimum 5)")


def test_outputs_are_not_overwritten(run, here, folder, packed, indicators):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        refused(run(*quantize("--bitops", "W4A4", "--data", folder, *more)), "out", "not a packed model")
    Path("out/thesis.txt").unlink()
    shutil.copytree(packed, "out", dirs_exist_ok=True)
    before = Path("out/model.mpq.safetensors").read_bytes()
    refused(run(*quantize("--bitops", "W4A4", "--data", folder)), "--overwrite")
    refused(run(*quantize("--bitops", "1K", "--data", folder, "--overwrite")), "(minimum ")
    assert Path("out/model.mpq.safetensors").read_bytes() == before
    again = ["indicators", *MODEL, *LOADING, "--data", folder, "--steps", "1", "--output"]
    refused(run(*again, indicators), "exists", "--overwrite")
    refused(run(*again, "out"), "folder")
    assert os.listdir(here) == ["out"]


def test_unknown_errors_keep_their_traceback(run, here, monkeypatch):
    import hub_mpq.cli.models

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(hub_mpq.cli.models, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("inspect", "resnet18")
