"""Image folders as batches, in the shape and colours a model wants."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import HubMPQError, InvalidArgument

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


class Shuffled(Sampler[int]):
    """A new order each epoch, the same for the same seed and epoch. It stays at epoch 0 until set_epoch is called."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class ShuffledEpochs(Shuffled):
    """The same order, as pairs (epoch, index): what an augmentation needs to be the same again."""

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())


class Images(Dataset[Any]):
    """Image files; (tensor, label) each, or the tensor alone when there are no labels.

    Asked for (epoch, index) it augments, with a generator of its own for each seed, epoch and index: the result
    does not depend on the workers, nor on where an interrupted run went on.
    """

    def __init__(self, files: Sequence[tuple[Path, int | None]], config: Mapping[str, Any], seed: int = 0) -> None:
        from timm.data.transforms_factory import create_transform

        self.files, self.seed, self.size = files, seed, config["input_size"]
        self.mode = "L" if self.size[0] == 1 else "RGB"
        self.transform: Any = create_transform(is_training=False, **config)
        self.normalize: Any = self.transform.transforms[-2:]  # to a tensor, mean and std
        self.interpolation = {"bilinear": 2, "bicubic": 3}.get(config["interpolation"], 2)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int] | Tensor:
        from PIL import Image

        epoch, index = key if isinstance(key, tuple) else (None, key)
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert(self.mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise HubMPQError(f"{path} is no image that can be read ({error})") from error
        if epoch is None:
            x = self.transform(pixels)
        else:
            x = self._augment(pixels, random.Random(f"{self.seed}:{epoch}:{index}"))
            for step in self.normalize:
                x = step(x)
        return x if label is None else (x, label)

    def _augment(self, image: Any, rng: random.Random) -> Any:
        """A random part (8 to 100 % of the area, sides 3:4 to 4:3), resized; mirrored half of the time (Inception)."""
        from PIL import Image, ImageOps

        width, height = image.size
        w = h = min(width, height)
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                w, h = across, down
                break
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        part = image.resize((self.size[2], self.size[1]), Image.Resampling(self.interpolation), (x, y, x + w, y + h))
        return ImageOps.mirror(part) if rng.random() < 0.5 else part


def read_class_map(path: str | Path) -> dict[str, int]:
    """{class folder: label} of a text file with one folder name a line, in the order of the labels."""
    try:
        names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HubMPQError(f"class map {path} cannot be read: {error}") from error
    if not names or len(set(names)) != len(names):
        raise InvalidArgument(f"class map {path} must name each class folder once, one a line")
    return {name: label for label, name in enumerate(names)}


def list_images(folder: str | Path, class_map: Mapping[str, int] | None = None) -> list[tuple[Path, int | None]]:
    """Files of a folder of class folders with labels, or of a folder of images without.

    Labels are the class map's, else the position of the class folder in natural order (timm's). Raises
    InvalidArgument when there are no images, when images and class folders are mixed, or for an unknown class.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidArgument(f"no such data folder: {root}")
    loose = [(path, None) for path in sorted(root.iterdir()) if path.suffix.lower() in IMAGES and path.is_file()]
    classes = {path.name: _walk(path) for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    filled = {name: files for name, files in classes.items() if files}
    if loose and filled:
        raise InvalidArgument(f"{root} holds images and class folders; labels are not clear: keep one of the two")
    if not loose and not filled:
        raise InvalidArgument(f"{root} holds no images")
    if loose:
        return list(loose)
    if {"train", "val", "validation", "test"} >= set(classes):
        raise InvalidArgument(
            f"{root} holds {' and '.join(sorted(classes))}: name one of them, for example {root}/train"
        )
    if class_map is None:
        from timm.utils.misc import natural_key

        class_map = {name: label for label, name in enumerate(sorted(classes, key=natural_key))}
    if unknown := sorted(set(filled) - set(class_map)):
        raise InvalidArgument(f"{root}: class folder {unknown[0]!r} is not in the class map ({len(unknown)} such)")
    return [(path, class_map[name]) for name in sorted(filled, key=class_map.__getitem__) for path in filled[name]]


def _walk(folder: Path) -> list[Path]:
    found = (Path(root) / file for root, _, files in os.walk(folder, followlinks=True) for file in files)
    return sorted(path for path in found if path.suffix.lower() in IMAGES)


def data_config(preprocess: Mapping[str, Any], input_shape: Sequence[int]) -> dict[str, Any]:
    """{input_size, mean, std, interpolation, crop_pct} from timm's data config, or from nothing but a shape."""
    if len(input_shape) != 3:
        raise InvalidArgument(
            f"the model takes inputs of shape {'×'.join(map(str, input_shape))}, not images; "
            "use hub_mpq from Python with a loader of your own"
        )
    channels = int(input_shape[0])

    def per_channel(name: str, default: float) -> tuple[float, ...]:
        values = tuple(preprocess.get(name) or (default,))
        return values if len(values) == channels else (sum(values) / len(values),) * channels

    return {
        "input_size": tuple(int(n) for n in input_shape),
        "mean": per_channel("mean", 0.5),
        "std": per_channel("std", 0.5),
        "interpolation": preprocess.get("interpolation") or "bilinear",
        "crop_pct": preprocess.get("crop_pct") or 1.0,
    }


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too; the training loop decides when to stop, with its next batch still to come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def image_loader(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    train: bool,
    classes: int | None = None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """Batches of (images, labels), or of images alone for a folder without class folders.

    config: as `data_config` gives it. train: shuffled, random crops and flips; else in order, one centre crop.
    classes: how many the model has; without a class map the folder must have exactly as many.
    """
    mapping = read_class_map(class_map) if class_map else None
    files = list_images(folder, mapping)
    labels = {label for _, label in files if label is not None}
    if classes and labels and mapping is None and len(labels) != classes:
        raise InvalidArgument(
            f"{folder} has {len(labels)} class folders and the model {classes} classes; "
            "give --class-map FILE with one folder name a line, in the order of the labels"
        )
    if classes and labels and max(labels) >= classes:
        raise InvalidArgument(f"{class_map} names {max(labels) + 1} classes or more and the model has {classes}")
    data = Images(files, config, seed)
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=ShuffledEpochs(len(data), seed) if train else None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts,
    )
