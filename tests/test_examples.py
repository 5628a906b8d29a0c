"""The examples run, at toy size, as a user would start them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
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
    assert "joint step over its passes as float steps" in done.stdout
    assert (tmp_path / "out" / "model.mpq.safetensors").is_file()
