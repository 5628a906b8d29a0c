"""Image data of the benchmarks as tensors, decoded once and kept in a cache outside the repository."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nets import data_root
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cache_root() -> Path:
    """$HUB_MPQ_CACHE or ~/.cache/hub_mpq."""
    root = Path(os.environ.get("HUB_MPQ_CACHE", Path.home() / ".cache" / "hub_mpq"))
    root.mkdir(parents=True, exist_ok=True)
    return root


class Images(Dataset):
    """Bytes [N, H, W, C] or [N, H, W] with labels; normalised and, for training, shifted and mirrored by the batch.

    `pad`: largest shift in pixels; `mirror`: left-right flips, each with a chance of one half. The draw depends on
    (seed, the batch's indices), never on global random state.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pad: int = 0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        self.pixels = pixels.unsqueeze(-1) if pixels.dim() == 3 else pixels
        self.labels, self.pad, self.mirror = labels, pad, mirror
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        x = self.pixels[indices].permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        if self.pad:
            size = x.shape[-1]
            wide = torch.nn.functional.pad(x, (self.pad,) * 4)
            top, left = (torch.randint(2 * self.pad + 1, (len(x),), generator=self.generator) for _ in range(2))
            x = torch.stack([w[:, i : i + size, j : j + size] for w, i, j in zip(wide, top, left, strict=True)])
        if self.mirror:
            flip = torch.rand(len(x), generator=self.generator) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
        return list(zip(x, self.labels[indices], strict=True))


def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """(pixels uint8 [N, 32, 32, 3], labels) of "train" or "test"."""
    file = cache_root() / f"cifar10-{split}.npz"
    if not file.exists():
        import pandas as pd

        frame = pd.read_parquet(data_root() / "cifar10" / f"{split}.parquet")
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in frame["jpeg"]])
        np.savez(file, pixels=pixels, labels=frame["label"].to_numpy().astype(np.int64))
    with np.load(file) as found:
        return torch.from_numpy(found["pixels"]), torch.from_numpy(found["labels"])


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """(pixels uint8 [N, 28, 28], labels) of "train" or "test"."""
    with np.load(data_root() / "mnist.npz") as found:
        part = "train" if split == "train" else "test"
        return torch.from_numpy(found[f"x_{part}"]), torch.from_numpy(found[f"y_{part}"].astype(np.int64))


def imagenet(split: str, side: int = 224) -> tuple[Tensor, Tensor]:
    """(pixels uint8 [N, side, side, 3], labels): bilinear resize to side·256/224, centre crop."""
    file = cache_root() / f"imagenet-{split}-{side}.npz"
    if not file.exists():
        root = data_root() / "imagenet"
        order = {w: i for i, w in enumerate((root / "classes.txt").read_text().split())}
        rows, labels = [], []
        for path in sorted((root / split).rglob("*.*")):
            image = Image.open(path).convert("RGB")
            short = round(side * 256 / 224)
            scale = short / min(image.size)
            image = image.resize([max(short, int(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
            left, top = ((s - side) // 2 for s in image.size)
            rows.append(np.asarray(image.crop((left, top, left + side, top + side))))
            labels.append(order[path.parent.name])
        np.savez(file, pixels=np.stack(rows), labels=np.array(labels))
    with np.load(file) as found:
        return torch.from_numpy(found["pixels"]), torch.from_numpy(found["labels"])


def loader(data: Dataset, batch: int, *, seed: int | None = None) -> DataLoader:
    """Shuffled by `seed`, in order when None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch, shuffle=seed is not None, generator=generator, drop_last=seed is not None)
