"""The whole route on tasks other than image classification, with real data: float, calibrated, fine-tuned.

    python examples/benchmarks/routes.py mnist-regression cifar-heads cifar-attributes stsb-cosine stsb sst2

A network that needs a head is first trained in float (once; the weights are kept in the cache folder). It is then
quantized with a mixed policy and measured before and after fine-tuning by the metrics of its task.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import images
import nets
import tasks
import texts
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hub_mpq import HubMPQ, Task
from hub_mpq.tasks import task_of
from hub_mpq.train import Finetune, fit

LENGTH = 48  # tokens per sentence or pair


class Route(NamedTuple):
    """A network with its data. `metrics`: those to print; `tune`: options of the fine-tuning."""

    load: Callable[[], HubMPQ]
    train: Callable[[], Iterable[Any]]
    test: Callable[[], Iterable[Any]]
    budget: dict[str, Any]
    metrics: tuple[str, ...]
    tune: dict[str, Any]


class Labelled(Dataset[Any]):
    """Images with labels from `label(pixels, classes)`, a tensor or a tuple of tensors."""

    def __init__(
        self, data: tuple[Tensor, Tensor], mean: Any, std: Any, label: Callable[[Tensor, Tensor], Any]
    ) -> None:
        self.images, self.label = images.Images(*data, mean, std), label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, y = self.images[index]
        return x, self.label(self.images.pixels[index], y)


def _split(data: Dataset[Any], *, train: bool) -> Iterable[Any]:
    return images.loader(data, 128, seed=0) if train else images.loader(data, 500)


def _float(name: str, net: nn.Module, train: Iterable[Any], task: Any = None, **options: Any) -> nn.Module:
    """Return `net` trained in float; the weights are cached."""
    file = images.cache_root() / f"{name}.safetensors"
    if not file.exists():
        known = task_of(task, net, next(iter(train)))
        rates = {"lr": options.pop("lr"), "scale_lr": 0.0, "weight_decay": 1e-4, "smoothing": 0.0}
        fit(net, Finetune(task=known, **rates), train, label="float", **options)
        save_file({k: v.clone() for k, v in net.state_dict().items()}, file)
    net.load_state_dict(load_file(file))
    return net.eval()


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


# numbers instead of digits


def mnist_regression() -> Route:
    def data(split: str) -> Iterable[Any]:
        labelled = Labelled(images.mnist(split), (0.1307,), (0.3081,), lambda _, y: y.float())
        return _split(labelled, train=split == "train")

    def load() -> HubMPQ:
        net = _seeded(tasks.DigitNet)
        net[-1] = _seeded(lambda: nn.Linear(32, 1))
        net = _float("mnist-regression", net, data("train"), lr=3e-3, epochs=2)
        return HubMPQ.from_module(net, torch.randn(1, 1, 28, 28), model_id="mnist-regression")

    tune = {"steps": 200, "lr": 1e-3}
    return Route(load, lambda: data("train"), lambda: data("test"), {"bitops": "W3A3"}, ("mse", "r2", "pearson"), tune)


# custom heads on ResNet-20


class TwoHeads(nn.Module):
    """A network with two heads: classes, and the mean colour of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nets.resnet20()
        self.classes, self.body.linear = self.body.linear, nn.Identity()
        self.colour = _seeded(lambda: nn.Linear(64, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"classes": self.classes(features), "colour": self.colour(features)}


def cifar_heads() -> Route:
    def label(pixels: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"classes": y, "colour": pixels.float().mean((0, 1)) / 64}

    def data(split: str) -> Iterable[Any]:
        labelled = Labelled(images.cifar10(split), images.CIFAR_MEAN, images.CIFAR_STD, label)
        return _split(labelled, train=split == "train")

    def load() -> HubMPQ:
        net = _float("cifar-heads", TwoHeads(), data("train"), lr=1e-3, steps=400)
        return HubMPQ.from_module(net, torch.randn(1, 3, 32, 32), model_id="cifar-heads")

    shown = ("classes/top1", "colour/mse", "colour/r2")
    return Route(
        load, lambda: data("train"), lambda: data("test"), {"bitops": "W3A3"}, shown, {"steps": 200, "lr": 1e-3}
    )


_ATTRIBUTES = ["0110", "0100", "1010", "1001", "1000", "1001", "1000", "1001", "0000", "0100"]
"""Attributes of CIFAR-10's classes: animal, has wheels, flies, kept as a pet or on a farm."""
ATTRIBUTES = torch.tensor([[int(bit) for bit in row] for row in _ATTRIBUTES])


def cifar_attributes() -> Route:
    def data(split: str) -> Iterable[Any]:
        labelled = Labelled(images.cifar10(split), images.CIFAR_MEAN, images.CIFAR_STD, lambda _, y: ATTRIBUTES[y])
        return _split(labelled, train=split == "train")

    def load() -> HubMPQ:
        net = nets.resnet20()
        net.linear = _seeded(lambda: nn.Linear(64, 4))
        net = _float("cifar-attributes", net, data("train"), "multi-label", lr=1e-3, steps=400)
        return HubMPQ.from_module(net, torch.randn(1, 3, 32, 32), model_id="cifar-attributes")

    shown = ("accuracy", "f1", "loss")
    return Route(
        load, lambda: data("train"), lambda: data("test"), {"bitops": "W3A3"}, shown, {"steps": 200, "lr": 1e-3}
    )


# sentences


def _tokens(first: list[str], second: list[str] | None = None) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(texts.minilm_path())
    found = tokenizer(first, second, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return dict(found)


def _batches(columns: dict[str, Tensor], size: int, *, shuffled: bool) -> DataLoader[Any]:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    generator = torch.Generator().manual_seed(0) if shuffled else None
    return DataLoader(rows, batch_size=size, shuffle=shuffled, generator=generator, drop_last=shuffled)  # type: ignore[arg-type]


def _pairs(split: str) -> tuple[list[str], list[str], Tensor]:
    first, second, scores = zip(*texts.stsb(split), strict=True)
    return list(first), list(second), torch.tensor(scores)


class Cosine(nn.Module):
    """Cosine of the mean-pooled embeddings of two sentences."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(texts.minilm_path(), add_pooling_layer=False)

    def forward(self, first: Tensor, first_mask: Tensor, second: Tensor, second_mask: Tensor) -> Tensor:
        rows = []
        for ids, mask in ((first, first_mask), (second, second_mask)):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            rows.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return F.cosine_similarity(rows[0], rows[1])


def stsb_cosine() -> Route:
    def data(split: str) -> Iterable[Any]:
        first, second, scores = _pairs(split)
        a, b = _tokens(first), _tokens(second)
        columns = {"first": a["input_ids"], "first_mask": a["attention_mask"]}
        columns |= {"second": b["input_ids"], "second_mask": b["attention_mask"], "labels": scores / 5}
        return _batches(columns, 16 if split == "train" else 64, shuffled=split == "train")

    def centred(x: Tensor) -> Tensor:
        return (x - x.mean()) / x.std().clamp_min(1e-6)

    def pearson(output: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"correlation": (centred(output) * centred(labels)).mean() * len(labels) / (len(labels) - 1)}

    def load() -> HubMPQ:
        task = Task.custom(lambda output, labels: (output - labels).square(), metrics=pearson, name="cosine")
        example = {k: v[:1] for k, v in next(iter(data("test"))).items() if k != "labels"}
        return HubMPQ.from_module(Cosine().eval(), example, model_id="stsb-cosine", task=task)

    return Route(
        load,
        lambda: data("train"),
        lambda: data("test"),
        {"bitops": "W4A6"},
        ("loss", "correlation"),
        {"steps": 60, "lr": 5e-5},
    )


def _bert(name: str, labels: int, train: Callable[[], Iterable[Any]], **options: Any) -> HubMPQ:
    from transformers import AutoModelForSequenceClassification

    def build() -> nn.Module:
        found: nn.Module = AutoModelForSequenceClassification.from_pretrained(texts.minilm_path(), num_labels=labels)
        return found

    net = _float(name, _seeded(build), train(), **options)
    example = {k: v[:1] for k, v in next(iter(train())).items() if k != "labels"}
    return HubMPQ.from_module(net, example, model_id=name)


def stsb() -> Route:
    def data(split: str) -> Iterable[Any]:
        first, second, scores = _pairs(split)
        return _batches(
            {**_tokens(first, second), "labels": scores}, 32 if split == "train" else 64, shuffled=split == "train"
        )

    return Route(
        lambda: _bert("stsb", 1, lambda: data("train"), lr=1e-4, steps=300),
        lambda: data("train"),
        lambda: data("test"),
        {"bitops": "W4A6"},
        ("mse", "pearson"),
        {"steps": 60, "lr": 5e-5},
    )


def sst2() -> Route:
    def data(split: str) -> Iterable[Any]:
        import pyarrow.parquet as pq

        rows = pq.read_table(nets.data_root() / "text" / "sst2" / f"{split}.parquet").to_pylist()
        labels = torch.tensor([int(row["label"]) for row in rows])
        tokens = _tokens([row["sentence"] for row in rows])
        return _batches({**tokens, "labels": labels}, 32 if split == "train" else 64, shuffled=split == "train")

    return Route(
        lambda: _bert("sst2", 2, lambda: data("train"), lr=1e-4, steps=200),
        lambda: data("train"),
        lambda: data("test"),
        {"bitops": "W3A4"},
        ("top1", "loss"),
        {"steps": 100, "lr": 5e-5},
    )


ROUTES = {
    "mnist-regression": mnist_regression,
    "cifar-heads": cifar_heads,
    "cifar-attributes": cifar_attributes,
    "stsb-cosine": stsb_cosine,
    "stsb": stsb,
    "sst2": sst2,
}


def run(name: str) -> dict[str, Any]:
    """Return the figures of one route: {"float" | "calibrated" | "tuned": metrics, …}."""
    route = ROUTES[name]()
    began = time.perf_counter()
    mpq, train, test = route.load(), route.train(), route.test()
    found: dict[str, Any] = {"float": mpq.evaluate(test)}
    mpq.quantize(train=train, epochs=0, indicator_options={"steps": 10}, **route.budget)
    found["calibrated"] = mpq.evaluate(test)
    mpq.finetune(train, **route.tune)
    found["tuned"] = mpq.evaluate(test)
    widths = {str(mpq.policy.bits[layer.name]) for layer in mpq.graph.searched}  # type: ignore[union-attr]
    return {**found, "budget": route.budget, "widths": sorted(widths), "seconds": round(time.perf_counter() - began)}


def main() -> None:
    """Print one line per stage or, with --json, everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ROUTES, []], default=list(ROUTES), help="default: all")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON lines")
    arguments = parser.parse_args()
    for name in arguments.names:
        found = run(name)
        if arguments.json:
            print(json.dumps({"route": name, **found}), flush=True)
            continue
        widths = f"{len(found['widths'])} different bit-widths"
        print(f"{name}: {found['float']['task']}, {found['budget']}, {widths}, {found['seconds']} s")
        for stage in ("float", "calibrated", "tuned"):
            shown = ROUTES[name]().metrics
            print(f"  {stage:10s}", "  ".join(f"{key} {found[stage][key]:.4f}" for key in shown), flush=True)


if __name__ == "__main__":
    main()
