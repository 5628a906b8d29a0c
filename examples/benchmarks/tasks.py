"""The tasks of the study: a network, its data, its budgets, and how long it may train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import images
import nets
import numpy as np
import texts
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hub_mpq import Candidates, HubMPQ
from hub_mpq.tasks import Classification
from hub_mpq.train import Finetune, fit


@dataclass(frozen=True)
class Task:
    """`measure` gives one value per test item (100 for a right answer) and the score; `score` that of some items;
    `distance`, where accuracy says little, how far what the net says of them is from what the float net says."""

    name: str
    build: Callable[[], HubMPQ]
    train: Callable[[int], Iterable[Any]]
    measure: Callable[[HubMPQ], tuple[list[Any], float]]
    score: Callable[[Any], float]
    levels: tuple[str, ...] = ("W4A4", "W3A3")
    unit: str = "top-1"
    distance: Callable[[Any], float] | None = None
    budget: Callable[[str], dict[str, Any]] = field(default=lambda level: {"bitops": level})
    uniform: Callable[[str], str] = field(default=lambda level: level)
    candidates: Any = None
    indicator_steps: int = 40
    indicator_options: Mapping[str, Any] = field(default_factory=dict)
    tune_steps: int = 120
    tune_options: Mapping[str, Any] = field(default_factory=dict)


def _top1(loader: Iterable[Any]) -> Callable[[HubMPQ], tuple[list[Any], float]]:
    @torch.no_grad()
    def measure(mpq: HubMPQ) -> tuple[list[Any], float]:
        mpq.eval()
        right = [(mpq(b[0]).argmax(-1) == b[1]).float().mul(100) for b in loader]
        items = torch.cat(right).tolist()
        return items, float(np.mean(items))

    return measure


def _float_once(name: str, net: nn.Module, train: Callable[[], Iterable[Any]], **settings: Any) -> nn.Module:
    """`net` trained in float, once: the weights are kept in the cache folder."""
    file = images.cache_root() / f"{name}.safetensors"
    if not file.exists():
        plain = Finetune(task=Classification(), scale_lr=0.0, smoothing=0.0, lr=settings.pop("lr"), weight_decay=5e-4)
        fit(net, plain, train(), **settings)
        save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file))
    return net.eval()


def lifted_resnet20() -> nn.Module:
    """ResNet-20 after six float epochs on the JPEG form of CIFAR-10."""
    return _float_once("resnet20-jpeg", nets.resnet20(), lambda: cifar_train(0), lr=0.02, epochs=6, optimizer="sgd")


def cifar_train(seed: int, batch: int = 128) -> Iterable[Any]:
    data = images.Images(*images.cifar10("train"), images.CIFAR_MEAN, images.CIFAR_STD, pad=4, mirror=True, seed=seed)
    return images.loader(data, batch, seed=seed)


def cifar_test() -> Iterable[Any]:
    return images.loader(images.Images(*images.cifar10("test"), images.CIFAR_MEAN, images.CIFAR_STD), 500)


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


def _mnist(seed: int) -> Iterable[Any]:
    return images.loader(images.Images(*images.mnist("train"), (0.1307,), (0.3081,), seed=seed), 128, seed=seed)


def _mnist_test() -> Iterable[Any]:
    return images.loader(images.Images(*images.mnist("test"), (0.1307,), (0.3081,)), 500)


def digit_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitNet()
    return _float_once("mnist-digitnet", net, lambda: _mnist(0), lr=0.05, epochs=2, optimizer="sgd")


def _imagenet(split: str, side: int, seed: int | None) -> Iterable[Any]:
    half = (0.5, 0.5, 0.5)
    data = images.Images(
        *images.imagenet(split, side),
        half,
        half,
        pad=4 if seed is not None else 0,
        mirror=seed is not None,
        seed=seed or 0,
    )
    return images.loader(data, 32, seed=seed)


def _image_task(name: str, build: Callable[[], nn.Module], side: int = 128) -> Task:
    return Task(
        name,
        lambda: HubMPQ.from_module(build(), torch.randn(1, 3, side, side), model_id=name),
        lambda seed: _imagenet("train", side, seed),
        lambda mpq: _top1(_imagenet("val", side, None))(mpq),
        np.mean,
        indicator_steps=30,
        indicator_options={"distill": 1.0},
        tune_steps=60,
        tune_options={"lr": 2e-4, "distill": 1.0},
    )


def _small(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], train: Any, test: Any, **more: Any
) -> Task:
    return Task(
        name,
        lambda: HubMPQ.from_module(build(), torch.randn(1, *shape), model_id=name),
        train,
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
    _spearman,
    texts.spearman,
    levels=("W4A8", "W3A8"),
    unit="Spearman · 100",
    distance=texts.distance,
    # bytes at the level, word embedding and header included: weights alone are searched
    budget=lambda level: {"size": level},
    candidates=Candidates((2, 3, 4, 5, 6, 7, 8), (8,)),
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
            lambda seed: cifar_train(seed, 64),
            cifar_test,
            tune_steps=100,
            tune_options={"lr": 1e-4, "scale_lr": 3e-3},
        ),
        _small("mnist", digit_net, (1, 28, 28), _mnist, _mnist_test, tune_options={"lr": 1e-3, "scale_lr": 3e-3}),
        _image_task("mobilenetv1", nets.mobilenet_v1),
        _image_task("mobilenetv2", nets.mobilenet_v2),
        MINILM,
    )
}
