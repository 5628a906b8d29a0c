"""The network, the data and the settings that the scenarios share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from hub_mpq.tasks import Classification
from hub_mpq.train.processes import world

_spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "conftest.py")
_toys = importlib.util.module_from_spec(_spec)  # by its path: folders have a conftest of their own
_spec.loader.exec_module(_toys)
_net = _toys._net

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
STILL = {"task": Classification(), "lr": 0.0, "scale_lr": 0.0, "weight_decay": 0.0, "smoothing": 0.1}
COUNTS = (44, 36)  # with 16 a step: a last step of 12 (8 and 4 on two processes) and of 4 (4 and none)


def samples(count=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    y = x[:, 0, :, :5].mean(1).argmax(1)
    x[torch.arange(count), 0, :, y] += 1
    return TensorDataset(x, y)


def loader(count=96, **options):
    """Batches of 16 a step over all processes."""
    return DataLoader(samples(count), batch_size=16 // world()[1], **options)


def rounded(rows):
    return {name: {str(bits): value for bits, value in row.items()} for name, row in rows.items()}
