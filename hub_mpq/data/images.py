"""Images of any source as tensors; unreadable ones are skipped and counted."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import HubMPQError


class Images(Dataset[Any]):
    """A data set of images as tensors.

    An item is `(tensor, label)`, or the tensor alone if there are no labels, or None if the image cannot be read.
    Indexed with `(epoch, index)`, the image is augmented by a generator seeded with seed, epoch and index, so the
    result depends neither on the workers nor on where an interrupted run was resumed.

    Args:
        source: Sequence of `(path or open file, label or None)`.
        config: Preprocessing, as returned by `data_config`.
        seed: Seed of the augmentation.
        max_corrupt: Fraction of the images that may be unreadable; one more raises `HubMPQError`, which names it.

    Example:
        >>> from PIL import Image
        >>> from hub_mpq.data import Images, data_config
        >>> Image.new("RGB", (40, 40)).save("black.png")
        >>> images = Images([("black.png", 7)], data_config({}, (3, 32, 32)))
        >>> pixels, label = images[0]
        >>> pixels.shape, label, images.corrupt
        (torch.Size([3, 32, 32]), 7, 0)
    """

    def __init__(
        self, source: Sequence[Any], config: Mapping[str, Any], seed: int = 0, *, max_corrupt: float = 0.0
    ) -> None:
        from timm.data.transforms_factory import create_transform

        self.source, self.seed, self.size = source, seed, config["input_size"]
        self.mode = "L" if self.size[0] == 1 else "RGB"
        self.transform: Any = create_transform(is_training=False, **config)
        self.normalize: Any = self.transform.transforms[-2:]  # to a tensor, mean and std
        self.interpolation = {"bilinear": 2, "bicubic": 3}.get(config["interpolation"], 2)
        self.max_corrupt = math.floor(max_corrupt * len(source))
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # one for all workers

    @property
    def corrupt(self) -> int:
        """Number of unreadable images so far, each counted once, in this process and its workers."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int] | Tensor | None:
        from PIL import Image

        epoch, index = key if isinstance(key, tuple) else (None, key)
        try:
            file, label = self.source[index]
            with Image.open(file) as image:
                pixels = image.convert(self.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self._skip(index, error)
            return None
        if epoch is None:
            x = self.transform(pixels)
        else:
            x = self._augment(pixels, random.Random(f"{self.seed}:{epoch}:{index}"))
            for step in self.normalize:
                x = step(x)
        return x if label is None else (x, label)

    def __getitems__(self, keys: list[Any]) -> list[Any]:
        """Load one batch.

        In training, if none of its images can be read, the next readable one replaces them, so that a last batch of
        one bad image does not end the run. In evaluation it would be counted twice.
        """
        items = [self[key] for key in keys]
        if not isinstance(keys[-1], tuple) or any(item is not None for item in items):
            return items
        epoch, last = keys[-1]
        for step in range(1, len(self)):
            if (item := self[epoch, (last + step) % len(self)]) is not None:
                return [item]
        return items

    def _skip(self, index: int, error: Exception) -> None:
        self._bad[index] = True
        if self.corrupt > self.max_corrupt:
            name = self.source.name(index) if hasattr(self.source, "name") else self.source[index][0]
            more = (
                f"; {self.corrupt} of {len(self)} images are unreadable, {self.max_corrupt} allowed"
                if self.corrupt > 1
                else ""
            )
            raise HubMPQError(f"{name} cannot be read as an image ({error}){more}") from error

    def _augment(self, image: Any, rng: random.Random) -> Any:
        """Inception augmentation: a random crop (8 to 100 % of the area, aspect ratio 3:4 to 4:3), resized, and
        flipped horizontally half of the time."""
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
