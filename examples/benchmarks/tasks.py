"""Tasks of the study: a network, its data, its budgets, and the length of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import images
import nets
import numpy as np
import texts
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hub_mpq import Candidates, HubMPQ
from hub_mpq.nn.types import device_of
from hub_mpq.tasks import Classification, to_device
from hub_mpq.train import Finetune, fit

CIFAR = (images.CIFAR_MEAN, images.CIFAR_STD)
DIGITS = ((0.1307,), (0.3081,))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIDE = 128  # pixels of ImageNet's images


@dataclass(frozen=True)
class Level:
    """A budget: the cost of the policy `uniform` in `limit`. widths: candidates of all layers, `name` of their set.

    Indicators are trained once for all levels of a set.
    """

    uniform: str
    name: str
    widths: Candidates
    limit: str = "bitops"


LOW, WIDE = Candidates((1, 2, 3, 4)), Candidates((1, 2, 3, 4, 5, 6))
LEVELS: dict[str, Level] = {
    "W2A2": Level("W2A2", "1-4", LOW),
    "W2A4": Level("W2A4", "1-6", WIDE),
    "W3A3": Level("W3A3", "2-6", Candidates()),
    "W4A4": Level("W4A4", "2-6", Candidates()),
    "W5A5": Level("W5A5", "2-8", Candidates((2, 3, 4, 5, 6, 7, 8))),
    "W6A6": Level("W6A6", "2-8", Candidates((2, 3, 4, 5, 6, 7, 8))),
    "bytes of W2": Level("W2A4", "1-4 by 4", Candidates((1, 2, 3, 4), (4,)), "size"),
}
"""Levels of image networks. The bytes of W2 are searched with all activations at 4 bits."""
SENTENCES: dict[str, Level] = {
    "W2A8": Level("W2A8", "1-4 by 8", Candidates((1, 2, 3, 4), (8,)), "size"),
    "W3A8": Level("W3A8", "2-8 by 8", Candidates((2, 3, 4, 5, 6, 7, 8), (8,)), "size"),
    "W4A8": Level("W4A8", "2-8 by 8", Candidates((2, 3, 4, 5, 6, 7, 8), (8,)), "size"),
}
"""Levels of sentence encoders: bytes including word embedding and header, as only weights are searched."""


@dataclass(frozen=True)
class Task:
    """A network with its data and budgets.

    `measure` returns one value per test item (100 for a correct answer) and the score; `score` is the score of some
    items; `distance`, where accuracy says little, is the distance of their outputs from those of the float network.
    `held`: batches that are used neither for training nor for testing."""

    name: str
    build: Callable[[], HubMPQ]
    train: Callable[[int], Iterable[Any]]
    held: Callable[[], Iterable[Any]]
    measure: Callable[[HubMPQ], tuple[list[Any], float]]
    score: Callable[[Any], float]
    levels: Mapping[str, Level] = field(default_factory=lambda: LEVELS)
    unit: str = "top-1"
    distance: Callable[[Any], float] | None = None
    indicator_steps: int | None = 40
    indicator_options: Mapping[str, Any] = field(default_factory=dict)
    tune_steps: int | None = 120
    tune_options: Mapping[str, Any] = field(default_factory=dict)

    def budget(self, level: str) -> dict[str, str]:
        """Return the limit of a level as a keyword of `HubMPQ.search`."""
        found = self.levels[level]
        return {found.limit: found.uniform}


def _top1(loader: Iterable[Any]) -> Callable[[HubMPQ], tuple[list[Any], float]]:
    @torch.no_grad()
    def measure(mpq: HubMPQ) -> tuple[list[Any], float]:
        mpq.eval()
        device = device_of(mpq)
        batches = (to_device(batch, device) for batch in loader)
        items = torch.cat([(mpq(x).argmax(-1) == y).float().mul(100) for x, y in batches]).tolist()
        return items, float(np.mean(items))

    return measure


def _float_once(name: str, net: nn.Module, train: Callable[[], Iterable[Any]], **settings: Any) -> nn.Module:
    """Return `net` trained in float; the weights are kept in the cache folder."""
    file = images.cache_root() / f"{name}.safetensors"
    if not file.exists():
        plain = Finetune(task=Classification(), scale_lr=0.0, smoothing=0.0, lr=settings.pop("lr"), weight_decay=5e-4)
        fit(net, plain, train(), **settings)
        save_file(net.cpu().state_dict(), file)
    net.load_state_dict(load_file(file))
    return net.eval()


def wrapped(net: nn.Module, name: str, *shape: int) -> HubMPQ:
    """Wrap a network for images [N, *shape], on the device of the benchmarks."""
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return HubMPQ.from_module(net.to(images.device()), example.to(images.device()), model_id=name)


HELD = 2048  # images of a training set that `Task.held` gives and the study does not train on
HELD_IMAGENET = 200


@cache
def _data(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of a data set on the device of the benchmarks, read once and shuffled.

    The files are sorted by class.
    """
    where = images.device()
    read = {"cifar10": images.cifar10, "mnist": images.mnist, "imagenet": lambda s: images.imagenet(s, SIDE, 95)}
    pixels, labels = read[name](split)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order].to(where), labels[order].to(where)


def _without(data: tuple[Tensor, Tensor], held: int) -> tuple[Tensor, Tensor]:
    return data[0][: len(data[0]) - held], data[1][: len(data[1]) - held]


def _last(data: tuple[Tensor, Tensor], held: int) -> tuple[Tensor, Tensor]:
    return data[0][-held:], data[1][-held:]


def lifted_resnet20() -> nn.Module:
    """Return ResNet-20 after six float epochs on the JPEG form of CIFAR-10."""
    return _float_once("resnet20-jpeg", nets.resnet20(), lambda: cifar_train(0), lr=0.02, epochs=6, optimizer="sgd")


def cifar_train(seed: int, batch: int = 128, held: int = 0) -> Iterable[Any]:
    """Return the training images without the last `held`, shifted and mirrored."""
    data = _without(_data("cifar10", "train"), held)
    return images.loader(images.Images(*data, *CIFAR, pad=4, mirror=True, seed=seed), batch, seed=seed)


def cifar_held() -> Iterable[Any]:
    return images.loader(images.Images(*_last(_data("cifar10", "train"), HELD), *CIFAR), 256)


def cifar_test() -> Iterable[Any]:
    return images.loader(images.Images(*_data("cifar10", "test"), *CIFAR), 500)


class DigitNet(nn.Sequential):
    """A small CNN for MNIST: four 3×3 convolutions, one of them depthwise, 10 logits."""

    def __init__(self) -> None:
        def block(i: int, o: int, stride: int, groups: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

        super().__init__(
            *block(1, 8, 1),
            *block(8, 16, 2),
            *block(16, 16, 1, 16),
            *block(16, 32, 2),
            *block(32, 32, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def _mnist(seed: int, held: int = 0) -> Iterable[Any]:
    return images.loader(images.Images(*_without(_data("mnist", "train"), held), *DIGITS, seed=seed), 128, seed=seed)


def _mnist_held() -> Iterable[Any]:
    return images.loader(images.Images(*_last(_data("mnist", "train"), HELD), *DIGITS), 256)


def _mnist_test() -> Iterable[Any]:
    return images.loader(images.Images(*_data("mnist", "test"), *DIGITS), 500)


def digit_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitNet()
    return _float_once("mnist-digitnet", net, lambda: _mnist(0), lr=0.05, epochs=2, optimizer="sgd")


def _imagenet_train(seed: int) -> Iterable[Any]:
    data = _without(_data("imagenet", "train"), HELD_IMAGENET)
    return images.loader(images.Images(*data, *HALF, pad=4, mirror=True, seed=seed), 32, seed=seed)


def _imagenet_held() -> Iterable[Any]:
    return images.loader(images.Images(*_last(_data("imagenet", "train"), HELD_IMAGENET), *HALF), 100)


def imagenet_test() -> Iterable[Any]:
    return images.loader(images.Images(*_data("imagenet", "val"), *HALF), 100)


def _image_task(name: str, build: Callable[[], nn.Module]) -> Task:
    return Task(
        name,
        lambda: wrapped(build(), name, 3, SIDE, SIDE),
        _imagenet_train,
        _imagenet_held,
        lambda mpq: _top1(imagenet_test())(mpq),
        np.mean,
        indicator_steps=30,
        indicator_options={"distill": 1.0},
        tune_steps=60,
        tune_options={"lr": 2e-4, "distill": 1.0},
    )


def _small(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], train: Any, held: Any, test: Any, **more: Any
) -> Task:
    return Task(
        name,
        lambda: wrapped(build(), name, *shape),
        train,
        held,
        lambda mpq: _top1(test())(mpq),
        np.mean,
        **more,
    )


def _spearman(mpq: HubMPQ) -> tuple[list[Any], float]:
    items = texts.measured_pairs(mpq)
    return items, texts.spearman(items)


MINILM = Task(
    "minilm",
    texts.minilm,
    texts.train_batches,
    texts.held_batches,
    _spearman,
    texts.spearman,
    levels=SENTENCES,
    unit="Spearman · 100",
    distance=texts.distance,
    indicator_steps=3,
    tune_steps=20,
    tune_options={"lr": 1e-4, "scale_lr": 1e-3},
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _small(
            "resnet20",
            lifted_resnet20,
            (3, 32, 32),
            lambda seed: cifar_train(seed, 64, HELD),
            cifar_held,
            cifar_test,
            tune_steps=100,
            tune_options={"lr": 1e-4, "scale_lr": 3e-3},
        ),
        _small(
            "mnist",
            digit_net,
            (1, 28, 28),
            lambda seed: _mnist(seed, HELD),
            _mnist_held,
            _mnist_test,
            tune_options={"lr": 1e-3, "scale_lr": 3e-3},
        ),
        _image_task("mobilenetv1", nets.mobilenet_v1),
        _image_task("mobilenetv2", nets.mobilenet_v2),
        MINILM,
    )
}
