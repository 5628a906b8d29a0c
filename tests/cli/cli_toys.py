"""The tiny model and its images, as the tests of the command line name them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image

SKELETON = ["test_resnet", "--input-size", "32", "--model-arg", "num_classes=3"]
MODEL = [*SKELETON, "--no-pretrained"]
UNTESTED = "hub_mpq uses private interfaces of"
"""Begins the line that a release of another library newer than any tested brings."""
LOADING = ["--batch-size", "8", "--workers", "0"]


def steps(states: Path) -> set[str]:
    """Names of the complete states in a run's folder, which the run may be removing."""
    with contextlib.suppress(FileNotFoundError):
        return {path.name for path in states.glob("*/step-*")}
    return set()


def images(root: Path, classes: int = 3, count: int = 8, side: int = 40) -> Path:
    """Class folders of noise in which the class is the brightest colour."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (side, side + 8, 3), dtype=np.uint8)
            pixels[..., label % 3] += 120
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root
