"""Images of any source as tensors; those that cannot be read are skipped and counted."""

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
    """(tensor, label) each, or the tensor alone when there are no labels; None for an image that cannot be read.

    source[i] is (path or open file, label or None). Asked for (epoch, index) it augments, with a generator of its own
    for each seed, epoch and index: the result does not depend on the workers, nor on where an interrupted run went on.

    max_corrupt: the part of the images that may be unreadable; one more raises HubMPQError, which names it. `corrupt`
    counts them, each once, whichever worker met it.
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
        """How many images could not be read so far, in this process and its workers."""
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
        """One batch. In training, when none of its images can be read, the first readable one behind them stands in:
        a last batch of one bad image is no reason to end a run. An evaluation would count that one twice."""
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
            more = f"; {self.corrupt} of {len(self)} cannot, {self.max_corrupt} may" if self.corrupt > 1 else ""
            raise HubMPQError(f"{name} is no image that can be read ({error}){more}") from error

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
