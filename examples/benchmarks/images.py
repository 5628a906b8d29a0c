"""Image data for the benchmarks as tensors, decoded once and cached outside the repository."""

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
from torch.utils.data.dataloader import default_collate

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cache_root() -> Path:
    """Return $HUB_MPQ_CACHE or ~/.cache/hub_mpq."""
    root = Path(os.environ.get("HUB_MPQ_CACHE", Path.home() / ".cache" / "hub_mpq"))
    root.mkdir(parents=True, exist_ok=True)
    return root


def device() -> torch.device:
    """Return the device of the benchmarks: a GPU if available (CUDA_VISIBLE_DEVICES= hides it), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Images(Dataset):
    """Bytes [N, H, W, C] or [N, H, W] with labels; normalised and, for training, shifted and mirrored batch by batch.

    `pad`: largest shift in pixels; `mirror`: left-right flips with a probability of one half. The augmentation depends
    only on the seed and the indices of the batch, so a resumed run sees the same images. Bytes and batches stay on the
    device of `pixels`; `loader` fetches a whole batch at once.
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
        self.labels, self.pad, self.mirror, self.seed = labels, pad, mirror, seed
        self.mean = torch.tensor(mean, device=pixels.device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=pixels.device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return [x, y] of the whole batch, which `loader` passes on unchanged."""
        where = self.pixels.device
        chosen = torch.tensor(indices, device=where)
        x = self.pixels[chosen].permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        generator = torch.Generator().manual_seed(hash((self.seed, *indices)) % 2**63)
        if self.pad:
            size = x.shape[-1]
            shifts = torch.randint(2 * self.pad + 1, (2, len(x), 1), generator=generator).to(where)
            rows, columns = shifts + torch.arange(size, device=where)
            wide = torch.nn.functional.pad(x, (self.pad,) * 4)
            sample = torch.arange(len(x), device=where)[:, None, None]
            x = wide.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.mirror:
            flip = (torch.rand(len(x), generator=generator) < 0.5).to(where)
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
        return [x.contiguous(), self.labels[chosen]]


def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """Return (pixels uint8 [N, 32, 32, 3], labels) of "train" or "test"."""
    file = cache_root() / f"cifar10-{split}.npz"
    if not file.exists():
        import pandas as pd

        frame = pd.read_parquet(data_root() / "cifar10" / f"{split}.parquet")
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in frame["jpeg"]])
        np.savez(file, pixels=pixels, labels=frame["label"].to_numpy().astype(np.int64))
    with np.load(file) as found:
        return torch.from_numpy(found["pixels"]), torch.from_numpy(found["labels"])


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Return (pixels uint8 [N, 28, 28], labels) of "train" or "test"."""
    with np.load(data_root() / "mnist.npz") as found:
        part = "train" if split == "train" else "test"
        return torch.from_numpy(found[f"x_{part}"]), torch.from_numpy(found[f"y_{part}"].astype(np.int64))


def imagenet(split: str, side: int = 224, quality: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (pixels uint8 [N, side, side, 3], labels): bilinear resize to side·256/224, centre crop.

    quality: the images are re-coded as WebP of this quality, so that the set of the study fits in 12 MB.
    """
    file = cache_root() / f"imagenet-{split}-{side}{f'-webp{quality}' if quality else ''}.npz"
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
            image = image.crop((left, top, left + side, top + side))
            rows.append(_webp(image, quality) if quality else np.asarray(image))
            labels.append(order[path.parent.name])
        if quality:
            lengths = np.array([len(row) for row in rows])
            np.savez(file, webp=np.concatenate(rows), lengths=lengths, labels=np.array(labels))
        else:
            np.savez(file, pixels=np.stack(rows), labels=np.array(labels))
    with np.load(file) as found:
        labels = torch.from_numpy(found["labels"])
        if not quality:
            return torch.from_numpy(found["pixels"]), labels
        coded = np.split(found["webp"], np.cumsum(found["lengths"])[:-1])
    pixels = [np.asarray(Image.open(io.BytesIO(row.tobytes())).convert("RGB")) for row in coded]
    return torch.from_numpy(np.stack(pixels)), labels


def _webp(image: Image.Image, quality: int) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=quality, method=6)
    return np.frombuffer(out.getvalue(), np.uint8)


def loader(data: Dataset, batch: int, *, seed: int | None = None) -> DataLoader:
    """Return a DataLoader, shuffled by `seed` without the last, smaller batch, or in order if `seed` is None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffled = seed is not None
    return DataLoader(
        data, batch_size=batch, shuffle=shuffled, generator=generator, drop_last=shuffled, collate_fn=_collate
    )


def _collate(items: list) -> list:
    """Return a batch that `Images` made as a whole unchanged; collate samples otherwise."""
    return items if isinstance(items[0], Tensor) else default_collate(items)
