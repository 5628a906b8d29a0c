"""Image folders as batches."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from hub_mpq.data import Shuffled, data_config, image_loader, list_images
from hub_mpq.errors import InvalidArgument

CONFIG = data_config({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}, (3, 16, 24))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_labels_follow_the_natural_order(folder):
    assert {path.parent.name: label for path, label in list_images(folder)} == {"1": 0, "2": 1, "10": 2}
    assert {label for _, label in list_images(folder, {"10": 7, "1": 3, "2": 5, "absent": 0})} == {3, 5, 7}


def test_an_empty_class_folder_keeps_its_label(folder):
    (folder / "0").mkdir()
    assert {path.parent.name: label for path, label in list_images(folder)} == {"1": 1, "2": 2, "10": 3}


def test_other_files_and_hidden_folders_are_no_images(folder):
    (folder / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    (folder / "1" / "labels.csv").write_text("x")
    (folder / "1" / "deeper").mkdir()
    (folder / "1" / "0.png").rename(folder / "1" / "deeper" / "0.PNG")
    assert len(list_images(folder)) == 12


def test_evaluation_is_one_centre_crop_in_order(folder):
    batches = list(image_loader(folder, CONFIG, train=False, batch_size=5))
    assert [tuple(x.shape) for x, _ in batches] == [(5, 3, 16, 24), (5, 3, 16, 24), (2, 3, 16, 24)]
    assert torch.cat([y for _, y in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    again = torch.cat([x for x, _ in image_loader(folder, CONFIG, train=False)])
    assert again.equal(torch.cat([x for x, _ in batches]))
    assert -1 <= again.min() < -0.5 < 0.5 < again.max() <= 1


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return torch.cat([x for x, _ in loader])


def test_training_is_a_function_of_seed_and_epoch(folder):
    first = epoch_of(image_loader(folder, CONFIG, train=True, batch_size=5, seed=3), 2)
    assert first.shape == (12, 3, 16, 24)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert epoch_of(image_loader(folder, CONFIG, train=True, batch_size=4, seed=3, workers=1), 2).equal(first)
    loader = image_loader(folder, CONFIG, train=True, seed=3)
    assert not epoch_of(loader, 1).equal(first)
    assert not epoch_of(image_loader(folder, CONFIG, train=True, seed=4), 2).equal(first)


def test_every_image_once_an_epoch():
    sampler = Shuffled(50, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(50))
    assert order != sorted(order)
    assert list(sampler) == order  # until the loop says that an epoch has passed


def test_one_channel(folder):
    config = data_config({"mean": (0.2, 0.4, 0.6), "std": (1.0, 1.0, 1.0)}, (1, 16, 16))
    assert config["mean"] == pytest.approx((0.4,))
    for train in (False, True):
        x, _ = next(iter(image_loader(folder, config, train=train)))
        assert x.shape == (12, 1, 16, 16)


def test_images_without_labels(folder):
    batch = next(iter(image_loader(folder / "1", CONFIG, train=True)))
    assert batch.shape == (4, 3, 16, 24)


def test_workers_outlive_ctrl_c(folder):
    loader = image_loader(folder, CONFIG, train=False, batch_size=1, workers=1)
    batches = iter(loader)
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 11


def test_shapes_that_are_no_images():
    with pytest.raises(InvalidArgument, match="expected images"):
        data_config({}, (128,))
