"""Toys that every folder of tests may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the workers of pytest-xdist share the cores: one thread each, here and in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def shared() -> Path:
    """The folder with real weights and data; skips when it is not there."""
    root = Path(os.environ.get("HUB_MPQ_DATA", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"real data are not at {root} (set HUB_MPQ_DATA)")
    return root


def _net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=4),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        )
        with torch.no_grad():
            net[-1].weight.mul_(20)  # logits that depend on the input more than on the bias
            for _ in range(20):  # statistics of a norm that has seen data
                net(torch.randn(32, 1, 8, 8))
        return net.eval()


@pytest.fixture(scope="session")
def make_net() -> Callable[[], nn.Module]:
    """Makes the network of `net`, for fixtures that live longer than a test."""
    return _net


@pytest.fixture
def net() -> nn.Module:
    """A small CNN, x [N, 1, 8, 8] to 5 logits; layers 3, 6 and 9 are searched, 0 and 13 fixed."""
    return _net()


@pytest.fixture
def data() -> TensorDataset:
    """96 learnable samples for `net`: the class is the brightest of five columns."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 1, 8, 8, generator=generator)
    y = x[:, 0, :, :5].mean(1).argmax(1)
    x[torch.arange(96), 0, :, y] += 1
    return TensorDataset(x, y)


@pytest.fixture
def train(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def val(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=32)
