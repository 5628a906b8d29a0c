"""Images from tar files, data sets and shards; images that cannot be read; loaders of the user's own."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from hub_mpq.data import data_config, image_loader
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, evaluate, fit

CONFIG = data_config({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}, (3, 16, 16))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("1", "2", "10"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def everything(loader):
    rows = [(x, y) for batch in loader for x, y in zip(*batch, strict=True)]
    return torch.stack([x for x, _ in rows]), [int(y) for _, y in rows]


def sorted_rows(x, y):
    return sorted((label, tuple(image.flatten()[:8].tolist())) for image, label in zip(x, y, strict=True))


def test_a_tar_file_is_its_folder(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.relative_to(folder))
    expected = sorted_rows(*everything(image_loader(folder, CONFIG, train=False)))
    for workers in (0, 2):
        found = image_loader(tmp_path / "images.tar", CONFIG, train=False, classes=3, batch_size=5, workers=workers)
        assert sorted_rows(*everything(found)) == expected
    # nothing is left beside it, an index in pickle least of all
    assert sorted(os.listdir(tmp_path)) == ["images", "images.tar"]
    training = image_loader(tmp_path / "images.tar", CONFIG, train=True, batch_size=5, seed=1)
    first, again = everything(training), everything(training)
    assert torch.equal(first[0], again[0])
    with pytest.raises(InvalidArgument, match="3 class folders, but the model has 5"):
        image_loader(tmp_path / "images.tar", CONFIG, train=False, classes=5)


def test_a_tar_file_with_a_class_map(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / "2" / "0.png", "2/0.png")
    (tmp_path / "classes.txt").write_text("10\n1\n2\n")
    _, labels = everything(
        image_loader(tmp_path / "images.tar", CONFIG, train=False, classes=3, class_map=tmp_path / "classes.txt")
    )
    assert labels == [2]


def test_a_damaged_tar_file_is_named(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"no tar file")
    with pytest.raises(InvalidArgument, match=r"cannot read .*images\.tar"):
        image_loader(tmp_path / "images.tar", CONFIG, train=False)


def spoil(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"torn")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_and_counted_once(folder, workers):
    spoil(folder, "1/0.png", "2/3.png")
    loader = image_loader(folder, CONFIG, train=True, batch_size=6, workers=workers, max_corrupt=0.1)
    for _ in range(2):
        x, y = everything(loader)
        assert len(x) == 22
        assert sorted(y) == [0] * 7 + [1] * 7 + [2] * 8
        assert loader.dataset.corrupt == 2
    assert evaluate(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), loader)["samples"] == 22


@pytest.mark.parametrize("workers", [0, 2])
def test_one_too_many_ends_it_with_a_name(folder, workers):
    spoil(folder, "1/0.png", "1/1.png", "10/7.png")
    loader = image_loader(folder, CONFIG, train=False, batch_size=4, workers=workers, max_corrupt=0.1)
    with pytest.raises(
        HubMPQError, match=r"10/7\.png cannot be read as an image .* 3 of 24 images are unreadable, 2 allowed"
    ):
        everything(loader)
    with pytest.raises(HubMPQError, match=r"1/0\.png cannot be read as an image"):
        everything(image_loader(folder, CONFIG, train=False, batch_size=4, workers=workers))


def test_a_batch_without_any_image_is_told(folder):
    spoil(folder, "1/0.png", "1/1.png")
    with pytest.raises(HubMPQError, match="cannot read any of the 2 images"):
        everything(image_loader(folder, CONFIG, train=False, batch_size=2, max_corrupt=0.5))


def test_training_goes_on_past_a_batch_without_any_image(folder):
    spoil(folder, "1/0.png", "1/1.png")
    loader = image_loader(folder, CONFIG, train=True, batch_size=1, max_corrupt=0.1)
    x, _ = everything(loader)
    assert len(x) == 24  # two stand-ins
    assert loader.dataset.corrupt == 2


def test_the_command_line_says_how_many_were_skipped(folder, tmp_path):
    from typer.testing import CliRunner

    from hub_mpq.cli import app

    spoil(folder, "1/0.png")
    args = ["indicators", "test_resnet", "--input-size", "32", "--model-arg", "num_classes=3", "--no-pretrained"]
    args += ["--data", str(folder), "--steps", "6", "--batch-size", "4", "--workers", "0"]
    done = CliRunner().invoke(app, [*args, "--output", str(tmp_path / "a"), "--max-corrupt", "0.05"])
    assert done.exit_code == 0, done.stderr
    assert "warning: 1 of 24 images could not be read and were skipped" in done.stderr
    refused = CliRunner().invoke(app, [*args, "--output", str(tmp_path / "b")])  # 1 % of 24 is none
    assert refused.exit_code == 2
    assert "0.png cannot be read as an image" in refused.stderr


def test_a_data_set_of_the_hub_library(folder):
    loader = image_loader(f"hfds/{folder}:train", CONFIG, train=False, classes=3)
    x, y = everything(loader)
    assert len(x) == 24
    assert sorted(y) == [0] * 8 + [1] * 8 + [2] * 8


def test_without_its_package_it_is_named(folder, monkeypatch):
    import sys

    for name in ("datasets", "timm.data.readers.reader_hfds"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HubMPQError, match=r"pip install 'hub-mpq\[data\]'"):
        image_loader(f"hfds/{folder}", CONFIG, train=False)


def shards(folder, root):
    """Three shards of webdataset's form, eight images each."""
    root.mkdir()
    for number, name in enumerate(("1", "2", "10")):
        with tarfile.open(root / f"train-{number:04d}.tar", "w") as tar:
            for path in sorted((folder / name).iterdir()):
                jpeg = io.BytesIO()
                Image.open(path).save(jpeg, "png")
                for ending, content in (("png", jpeg.getvalue()), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"{name}-{path.stem}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    files = [f"train-{i:04d}.tar" for i in range(3)]
    split = {"name": "train", "filenames": files, "shard_lengths": [8, 8, 8], "num_samples": 24}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return root


def test_shards_train_as_a_stream(folder, tmp_path):
    loader = image_loader(f"wds/{shards(folder, tmp_path / 'shards')}:train", CONFIG, train=True, batch_size=4)
    assert len(loader) == 6
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    log = fit(
        net, Finetune(task=Classification(), lr=1e-3, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0), loader, epochs=2
    )
    assert log.steps == 12
    assert log.samples == 48


def test_a_stream_of_datasets_trains():
    """As text for transformers comes: tokens made on the way, no length."""
    import datasets

    def rows():
        for i in range(40):
            yield {"x": [float(i % 3 == j) for j in range(3)], "label": i % 3}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, labels=None):
            return self.linear(x)

    stream = datasets.IterableDataset.from_generator(rows).map(lambda row: {"labels": row["label"]})
    loader = DataLoader(stream.remove_columns("label").with_format("torch"), batch_size=8)
    hooks = Finetune(task=Classification(), lr=0.1, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0)
    log = fit(Net(), hooks, loader, steps=30)
    assert log.steps == 30
    assert log.epoch_loss[-1] < 1.0
