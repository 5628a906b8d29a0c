"""hub-mpq launch: two processes of one command, of which one speaks and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


def images(root):
    generator = np.random.default_rng(0)
    for label in range(3):
        (root / "train" / f"class{label}").mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(255, size=(40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / f"class{label}" / f"{i}.png")


def launch(folder, *args):
    command = [sys.executable, "-m", "hub_mpq", "launch", "--processes", "2", "--cpu", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


MODEL = ["test_resnet", "--input-size", "32", "--model-arg", "num_classes=3", "--no-pretrained"]
LOADING = ["--data", "train", "--batch-size", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def folder(once):
    def make(folder):
        images(folder)
        lengths = ["--indicator-steps", "4", "--steps", "2"]
        args = ["quantize", *MODEL, *LOADING, *lengths, "--val", "train", "--bitops", "W4A4"]
        done = launch(folder, *args, "--output", "out", "--log-with", "jsonl", "--json")
        (folder / "done.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

    return once("launched", make)


@pytest.fixture(scope="module")
def quantized(folder):
    code, stdout, stderr = json.loads((folder / "done.json").read_text())
    return subprocess.CompletedProcess([], code, stdout, stderr)


def test_the_whole_route_on_two_processes(folder, quantized):
    assert quantized.returncode == 0, quantized.stderr
    report = json.loads(quantized.stdout)  # one object: one process speaks
    assert report["search"]["status"] == "optimal"
    assert report["metrics"]["quantized"]["samples"] == 24
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "out", "out.logs", "train"]
    assert (folder / "out" / "model.mpq.safetensors").is_file()


def test_the_first_line_says_how_many_and_on_what(quantized):
    untested = "hub_mpq uses private interfaces of"  # a newer release of another library was installed
    lines = [line for line in quantized.stderr.splitlines() if not line.startswith(untested)]
    assert lines[0] == "hub-mpq: 2 processes, device cpu, gloo"
    assert "Traceback" not in quantized.stderr
    assert "Warning" not in quantized.stderr


def test_the_tracker_has_losses_per_width_speed_and_trajectories(folder, quantized):
    rows = [json.loads(line) for line in (folder / "out.logs" / "indicators.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4]  # once each, though two processes trained
    for row in rows:
        losses = [name for name in row if name.startswith("loss/")]
        assert losses == [*(f"loss/{bits} bits" for bits in (2, 3, 4, 5, 6)), "loss/random widths"]
        assert row["samples/s"] > 0
    moved = [row["scale/activation/layer1.0.conv2/4"] for row in rows]
    assert moved[0] != moved[1]
    assert (folder / "out.logs" / "fine-tune.jsonl").is_file()
    assert (folder / "out.logs" / "indicators.png").stat().st_size > 1000


def test_a_mistake_ends_both_with_its_own_code(folder, quantized):
    again = launch(folder, "quantize", *MODEL, *LOADING, "--bitops", "W4A4", "--output", "out")
    assert again.returncode == 2
    assert "out already holds a packed model" in again.stderr
    assert "Traceback" not in again.stderr


def test_only_commands_that_train_are_launched(folder):
    refused = launch(folder, "inspect", *MODEL)
    assert refused.returncode == 2
    assert "expected a command to launch (indicators, quantize, finetune, evaluate)" in refused.stderr
