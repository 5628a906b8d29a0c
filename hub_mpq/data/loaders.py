"""Batches of images for the training loop, from folders, tar files, data sets of the Hub, and shards."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

from ..errors import HubMPQError, InvalidArgument
from ..versions import warn_if_untested
from .folders import read_class_map
from .images import Images
from .order import ShuffledEpochs
from .sources import is_stream, open_source, stream


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too; the training loop decides when to stop, with its next batch still to come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def without_corrupt(items: list[Any]) -> Any:
    """A batch of the images that could be read."""
    kept = [item for item in items if item is not None]
    if not kept:
        raise HubMPQError(f"none of the {len(items)} images of a batch can be read")
    return default_collate(kept)


def image_loader(
    data: str | Path,
    config: Mapping[str, Any],
    *,
    train: bool,
    classes: int | None = None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    max_corrupt: float = 0.0,
) -> DataLoader[Any]:
    """Batches of (images, labels), or of images alone for a folder without class folders.

    data: a folder of class folders or of images, a .tar file of class folders, "hfds/NAME[:SPLIT]" (a data set of the
    Hub or a local folder), or shards, read as a stream: "wds/FOLDER[:SPLIT]", "hfids/NAME[:SPLIT]" (timm's readers).
    config: as `data_config` gives it. train: shuffled, random crops and flips; else in order, one centre crop.
    classes: how many the model has; without a class map the folder must have exactly as many.
    workers: processes that read the images, 0 for none; a stream is read by one at least.
    max_corrupt: the part of the images that is skipped when it cannot be read; a stream skips all such.
    """
    warn_if_untested("timm")
    mapping = read_class_map(class_map) if class_map else None
    if is_stream(data):
        return stream(
            str(data), config, train=train, class_map=mapping, batch_size=batch_size, workers=workers, seed=seed
        )
    source = open_source(data, mapping)
    labels = source.labels
    if classes and labels and mapping is None and len(labels) != classes:
        raise InvalidArgument(
            f"{data} has {len(labels)} class folders and the model {classes} classes; "
            "give --class-map FILE with one folder name a line, in the order of the labels"
        )
    if classes and labels and max(labels) >= classes:
        raise InvalidArgument(f"{class_map} names {max(labels) + 1} classes or more and the model has {classes}")
    images = Images(source, config, seed, max_corrupt=max_corrupt)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=ShuffledEpochs(len(images), seed) if train else None,
        collate_fn=without_corrupt,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts,
    )
