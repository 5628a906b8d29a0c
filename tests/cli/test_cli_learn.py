"""indicators, quantize, finetune, evaluate: what they write and print."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from cli_toys import LOADING, MODEL, UNTESTED

from hub_mpq import HubMPQ
from hub_mpq.pack import read_indicators


def only_json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_indicators_carry_provenance(indicators):
    learned = read_indicators(indicators)
    assert len(learned.weight) == 14
    assert learned.provenance["steps"] == 2
    assert "rank_correlation" in learned.provenance["movement"]["weight"]


def test_quantize_in_one_command(run, folder, tmp_path):
    out, picture = tmp_path / "deep" / "out", tmp_path / "policy.png"
    args = ["quantize", *MODEL, *LOADING, "--data", folder, "--val", folder, "--bitops", "W3A3", "--output", out]
    tree = only_json(run(*args, "--steps", "2", "--indicator-steps", "1", "--plot", picture, "--json"))
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.mpq.safetensors", "indicators.safetensors"} <= files
    assert tree["packed_bytes"] == (out / "model.mpq.safetensors").stat().st_size == tree["usage"]["size"]
    assert {"float", "quantized"} == set(tree["metrics"])
    assert tree["search"]["status"] == "optimal"
    assert {"indicators", "search", "finetune"} <= set(tree["seconds"])
    assert picture.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "policy.png"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no checkpoints are left
    measured = only_json(run("evaluate", out, "--data", folder, *LOADING, "--json"))
    assert measured["top1"] == pytest.approx(tree["metrics"]["quantized"]["top1"])
    assert measured["quantized"] is True
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert only_json(run("inspect", out, "--json"))["input_shape"] == [3, 32, 32]
    assert HubMPQ.from_pretrained(out).source.example[0].shape == (1, 3, 32, 32)


def test_a_task_that_is_named(run, folder, tmp_path):
    """Numbers of class folders as numbers: the model's one output has no classes."""
    model = [word.replace("num_classes=3", "num_classes=1") for word in MODEL]
    given = [*model, *LOADING, "--data", folder]
    assert "3 class folders, but the model has 1 classes" in run("evaluate", *given).stderr
    found = only_json(run("evaluate", *given, "--task", "regression", "--json"))
    assert found["task"] == "regression"
    assert {"mse", "mae"} <= set(found)
    args = ["quantize", *given, "--val", folder, "--bitops", "W4A4", "--steps", "1", "--indicator-steps", "1"]
    tree = only_json(run(*args, "--task", "regression", "--output", tmp_path / "out", "--json"))
    assert tree["metrics"]["float"]["mse"] == pytest.approx(found["mse"], rel=1e-5)
    assert tree["metrics"]["quantized"]["task"] == "regression"
    said = run("evaluate", tmp_path / "out", *LOADING, "--data", folder, "--task", "regression").stdout
    assert said.startswith("task regression  mse ")


def test_one_seed_one_result(run, folder, indicators, tmp_path):
    args = ["quantize", *MODEL, "--batch-size", "8", "--data", folder, "--indicators", indicators, "--bitops", "W4A4"]
    sizes = []
    for name, workers in (("a", 0), ("b", 1)):
        run(*args, "--steps", "4", "--output", tmp_path / name, "--workers", workers, "--seed", 5)
        sizes.append((tmp_path / name / "model.mpq.safetensors").read_bytes())
    assert sizes[0] == sizes[1]  # whatever the number of workers
    run(*args, "--steps", "4", "--output", tmp_path / "c", "--workers", 0, "--seed", 6)
    assert (tmp_path / "c" / "model.mpq.safetensors").read_bytes() != sizes[0]


def test_without_data_it_warns_and_calibrates(tmp_path):
    args = ["quantize", *MODEL, "--bitops", "W4A4", "--output", str(tmp_path / "out"), "--json"]
    done = subprocess.run([sys.executable, "-m", "hub_mpq", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["search"]["status"] == "optimal"  # nothing but the object on stdout
    first, warning = (line for line in done.stderr.splitlines() if not line.startswith(UNTESTED))
    assert first == "hub-mpq: 1 process, device cpu"
    assert warning.startswith("warning: no training data")


def test_unlabelled_images_are_distilled(run, folder, tmp_path):
    shutil.copytree(folder / "class0", tmp_path / "plain")
    args = [
        "quantize",
        *MODEL,
        *LOADING,
        "--data",
        tmp_path / "plain",
        "--bitops",
        "W4A4",
        "--output",
        tmp_path / "out",
    ]
    only_json(run(*args, "--steps", "1", "--indicator-steps", "1", "--json"))
    assert read_indicators(tmp_path / "out" / "indicators.safetensors").provenance["distill"] == 1.0


def test_finetune_goes_on_from_a_packed_folder(run, folder, packed, tmp_path):
    tree = only_json(
        run("finetune", packed, *LOADING, "--data", folder, "--output", tmp_path / "out", "--steps", "2", "--json")
    )
    before, after = HubMPQ.from_pretrained(packed), HubMPQ.from_pretrained(tmp_path / "out")
    assert before.policy == after.policy
    assert tree["policy"] == before.policy.to_dict()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(before(x), after(x))


@pytest.mark.parametrize("source", ["level", "file"])
def test_finetune_at_a_known_policy(run, folder, packed, tmp_path, source):
    policy = "W3A4"
    if source == "file":
        policy = tmp_path / "policy.json"
        policy.write_text(json.dumps(HubMPQ.from_pretrained(packed).policy.to_dict()))
    args = ["finetune", *MODEL, *LOADING, "--data", folder, "--policy", policy, "--output", tmp_path / "out"]
    tree = only_json(run(*args, "--steps", "1", "--lr", "1e-3", "--json"))
    widths = {v for k, v in tree["policy"]["bits"].items() if k not in ("conv1.0", "fc")}
    assert widths == {"W3A4"} if source == "level" else len(widths) > 1


def test_overwrite_replaces_a_packed_folder(run, folder, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    args = ["finetune", *MODEL, *LOADING, "--data", folder, "--policy", "W2A2", "--steps", "1"]
    only_json(run(*args, "--output", tmp_path / "out", "--overwrite", "--json"))
    assert HubMPQ.from_pretrained(tmp_path / "out").policy.bits["conv1.3"].weight == 2


def test_class_map_gives_the_labels(run, folder, tmp_path):
    (tmp_path / "map.txt").write_text("class2\nclass0\nclass1\n")
    plain = only_json(run("evaluate", *MODEL, *LOADING, "--data", folder, "--json"))
    mapped = only_json(
        run("evaluate", *MODEL, *LOADING, "--data", folder, "--class-map", tmp_path / "map.txt", "--json")
    )
    assert plain["samples"] == mapped["samples"] == 24
    assert plain["loss"] != mapped["loss"]
