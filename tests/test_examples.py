"""The examples run, at toy size, as a user would start them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_imagenet_from_float_weights_to_the_reloaded_folder(tmp_path):
    generator = np.random.default_rng(0)
    names = [f"n{i:08d}" for i in range(1000)]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    for split in ("train", "val"):
        for name in names[3:6]:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(generator.integers(255, size=(40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    command = [sys.executable, EXAMPLES / "imagenet.py", "--data", tmp_path, "--model", "test_resnet"]
    command += ["--checkpoint", tmp_path / "model.safetensors", "--size", "32", "--batch-size", "4"]
    command += ["--indicator-steps", "1", "--steps", "1", "--output", tmp_path / "out"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reloaded logits equal: True" in done.stdout
    assert "time of a joint step / float steps of the same passes" in done.stdout
    assert (tmp_path / "out" / "model.mpq.safetensors").is_file()


def _folder(root):
    generator = np.random.default_rng(0)
    for label in range(3):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(8):
            Image.fromarray(generator.integers(255, size=(40, 40, 3), dtype=np.uint8)).save(
                root / f"class{label}" / f"{i}.png"
            )
    return root


def test_indicators_by_the_same_script_alone_and_as_two_processes(tmp_path):
    """The command is that of the README, and the total batch is the same."""
    from hub_mpq.cli.launch import arguments
    from hub_mpq.pack import read_indicators

    script = [EXAMPLES / "train_indicators.py", "test_convnext", "--side", "32", "--classes", "3", "--no-pretrained"]
    script += ["--data", _folder(tmp_path / "train"), "--steps", "3"]
    starts = {
        "1 process, device cpu": [sys.executable, *script, "--batch-size", "8"],
        "2 processes, device cpu, gloo": [
            *[sys.executable, "-m", "accelerate.commands.launch", *arguments(2)],
            *[*script, "--batch-size", "4"],
        ],
    }
    found = []
    for first, command in starts.items():
        out = tmp_path / f"{len(found)}.safetensors"
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*map(str, command), "--output", str(out)], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = done.stdout.splitlines()
        assert lines[0] == first
        assert len(lines) == 2  # one process speaks
        found.append(read_indicators(out))
    alone, both = found
    assert both.provenance["samples"] == alone.provenance["samples"] == 24
    # the same samples in the same order, and no BatchNorm, which would see half of each batch
    for side, moved in alone.provenance["movement"].items():
        assert both.provenance["movement"][side] == pytest.approx(moved, rel=0.05), side
    # the labels that each process draws are its own: layers have errors of a fifth, and all may err alike
    ratios = [math.log(both.weight[name][2] / row[2]) for name, row in alone.weight.items()]
    errors = [math.hypot(alone.standard_error[name], both.standard_error[name]) for name in alone.weight]
    assert 2 * np.median(errors) < math.log(2)  # a sum in place of a mean would be seen
    assert abs(np.mean(ratios)) < 2 * np.median(errors)
