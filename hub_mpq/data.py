"""Image folders as batches, in the shape and colours a model wants."""

from __future__ import annotations

import os
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


class Images(Dataset[Any]):
    """Image files; (tensor, label) each, or the tensor alone when there are no labels."""

    def __init__(self, files: Sequence[tuple[Path, int | None]], transform: Any, channels: int) -> None:
        self.files, self.transform, self.mode = files, transform, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert(self.mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise HubMPQError(f"{path} is no image that can be read ({error})") from error
        x = self.transform(pixels)
        return x if label is None else (x, label)


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
    from timm.data.transforms_factory import create_transform

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
    extra = {"color_jitter": None} if train else {"crop_pct": config["crop_pct"]}
    transform = create_transform(
        input_size=config["input_size"],
        is_training=train,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        **extra,
    )
    data = Images(files, transform, config["input_size"][0])
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=Shuffled(len(data), seed) if train else None,
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts,
    )
