"""Batches of images for the training loop, from folders, tar files, Hub data sets, and shards."""

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
    """Ignore Ctrl-C in a worker: the training loop decides when to stop and may need one more batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def without_corrupt(items: list[Any]) -> Any:
    """Collate the images that could be read."""
    kept = [item for item in items if item is not None]
    if not kept:
        raise HubMPQError(f"cannot read any of the {len(items)} images of a batch")
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
    """Create a DataLoader of images.

    Args:
        data: A folder of class folders or of images, a `.tar` file of class folders, `"hfds/NAME[:SPLIT]"` (a Hub data
            set or a local folder), or shards read as a stream with timm's readers: `"wds/FOLDER[:SPLIT]"`,
            `"hfids/NAME[:SPLIT]"`.
        config: Preprocessing, as returned by `data_config`.
        train: Shuffle, and augment with random crops and flips; otherwise keep the order and take one center crop.
        classes: Number of classes of the model; without a class map, the folder must contain exactly as many.
        class_map: A file with one class folder per line, in the order of the labels; see `read_class_map`.
        batch_size: Images per batch.
        workers: Processes that read images, 0 for none; a stream uses at least one.
        seed: Seed of the order and the augmentation.
        max_corrupt: Fraction of the images that may be unreadable and are skipped; a stream skips all such images.

    Returns:
        A DataLoader of `(images, labels)`, or of images alone for a folder without class folders.

    Raises:
        InvalidArgument: The data cannot be opened, or their classes do not fit the model.
        HubMPQError: A package is not installed, or the class map cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from hub_mpq.data import data_config, image_loader
        >>> for name in ("cat", "dog"):
        ...     Path("pets", name).mkdir(parents=True)
        ...     Image.new("RGB", (40, 40)).save(f"pets/{name}/1.png")
        >>> loader = image_loader("pets", data_config({}, (3, 32, 32)), train=False, classes=2)
        >>> len(loader)
        1
        >>> image, label = loader.dataset[1]
        >>> image.shape, label
        (torch.Size([3, 32, 32]), 1)
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
            f"{data} has {len(labels)} class folders, but the model has {classes} classes; "
            "pass --class-map FILE with one folder name per line, in the order of the labels"
        )
    if classes and labels and max(labels) >= classes:
        raise InvalidArgument(f"{class_map} has at least {max(labels) + 1} classes, but the model has {classes}")
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
