"""Quantize and measure real models, publish them to a loopback Hub, and pull them as each audience would.

    python examples/benchmarks/cards.py [--models resnet20 mobilenetv1 minilm mobilenetv2] [--cards model_cards]

Prints a table of bytes and seconds and, with --cards, saves each published card in that folder. Indicators are those of
the study (--indicators: its folder in the cache); missing ones are trained. mobilenetv2 (timm and its TimmWrapper) and
minilm-w4 (compressed-tensors) are only calibrated and get no card.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub import loopback, publish_and_pull


@dataclass(frozen=True)
class Recipe:
    """`level`: of the uniform row and of the budget. `steps`: of fine-tuning, for both. `card`: metadata."""

    level: str
    steps: int
    metric: str = "top1"
    build: str = ""
    card: dict[str, Any] = field(default_factory=dict)


IMAGES = {"pipeline_tag": "image-classification"}
RECIPES = {
    "resnet20": Recipe(
        "W4A4",
        30,
        build="resnet20",
        card={
            **IMAGES,
            "license": "bsd-2-clause",
            "dataset": "CIFAR-10 test images (JPEG form)",
            "trained_on": "CIFAR-10 training images (JPEG form)",
        },
    ),
    "mobilenetv1": Recipe(
        "W4A4",
        30,
        build="mobilenet_v1",
        card={
            **IMAGES,
            "license": "apache-2.0",
            "dataset": "ImageNet-1k validation images, 800 of them at 128 pixels",
            "trained_on": "1000 ImageNet-1k training images, one a class, at 128 pixels",
        },
    ),
    "minilm": Recipe(
        "W3A8",
        12,
        metric="spearman",
        card={
            "base_model": "sentence-transformers/all-MiniLM-L6-v2",
            "dataset": "STS-B test pairs",
            "trained_on": "STS-B training sentences, without labels",
        },
    ),
    "mobilenetv2": Recipe("W6A8", 0, card={"license": "apache-2.0"}),
    "minilm-w4": Recipe("W4", 0, card={"format": "compressed-tensors"}),
}


def made(name: str, recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """Return (the quantized model, with float, uniform, mixed and float copy measured; some inputs of one batch)."""
    from study import indicators_of
    from tasks import TASKS

    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    task = TASKS[name]
    mpq, train = task.build(), task.train(0)
    figures: dict[str, dict[str, float]] = {}

    def measure(label: str, model: Any) -> None:
        items, score = task.measure(model)
        figures[label] = {recipe.metric: round(score, 4), "samples": float(len(items))}
        print(f"{name} {label}: {score:.2f} of {len(items)}", flush=True)

    def tuned(policy: Any) -> None:
        mpq.apply_policy(policy, train, reestimate_norms=False)
        mpq.finetune(train, steps=recipe.steps, seed=0, **task.tune_options)

    measure("float", mpq)
    uniform = task.levels[recipe.level].uniform
    tuned(uniform)
    measure(f"uniform {uniform}", mpq)
    indicators_of(mpq, task, "mixed", recipe.level, 0, folder, {})
    result = mpq.search(**task.budget(recipe.level))
    tuned(result.policy)
    mpq.result = result
    measure("quantized", mpq)
    if mpq.graph.library != "module":
        plain = copy.deepcopy(mpq.float_model)
        plain.load_state_dict(float_copy_state(mpq.model, libraries.get(mpq.source.library)), strict=False)
        measure("float copy", plain)
    mpq.metrics = figures
    batch = next(iter(train))
    return mpq, {k: v[:8] for k, v in batch.items()} if isinstance(batch, dict) else batch[0][:8]


def weight_only_minilm(recipe: Recipe) -> tuple[Any, Any]:
    """Return MiniLM with all weights at one bit-width, untrained: plain transformers loads it by compressed-tensors."""
    import texts

    from hub_mpq import HubMPQ

    mpq = HubMPQ.from_pretrained(texts.minilm_path(), fixed={"*": None}, weight_only=True, tie_fused=True)
    return mpq.apply_policy(recipe.level), texts.train_batches(0)[0]


def calibrated_mobilenetv2(recipe: Recipe) -> tuple[Any, Any]:
    """Return a model that timm builds by name, calibrated on 64 images at 128 pixels, with its folded BatchNorm."""
    from images import Images, imagenet
    from nets import data_root

    from hub_mpq import HubMPQ

    file = data_root() / "weights" / "mobilenetv2_100.keras_in1k_int8dq" / "model.safetensors"
    mpq = HubMPQ.from_pretrained("mobilenetv2_100", checkpoint_path=file, pad_type="same", bn_eps=1e-3)
    pixels, labels = imagenet("train", 128)
    half = (0.5, 0.5, 0.5)
    x, _ = Images(pixels[:64], labels[:64], half, half).__getitems__(list(range(64)))
    mpq.apply_policy(recipe.level, [x], reestimate_norms=False)
    return mpq, x[:8]


UNTRAINED = {"mobilenetv2": calibrated_mobilenetv2, "minilm-w4": weight_only_minilm}
"""Calibrated only: they show which audience loads which format, and get no card."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--cards", type=Path, help="folder for the published cards")
    parser.add_argument("--indicators", default="study", help="folder of the indicators in the cache")
    args = parser.parse_args()
    with loopback() as (hub, root):
        import torch
        from images import cache_root

        torch.set_num_threads(1)
        lines = []
        for name in args.models:
            recipe, began = RECIPES[name], time.process_time()
            if name in UNTRAINED:
                mpq, inputs = UNTRAINED[name](recipe)
            else:
                folder = cache_root() / args.indicators
                folder.mkdir(exist_ok=True)
                mpq, inputs = made(name, recipe, folder)
            print(f"{name} made: {time.process_time() - began:.0f} s CPU", flush=True)
            rows = publish_and_pull(hub, root, name, mpq, inputs, build=recipe.build, card=recipe.card)
            lines += [f"| {name} | {r.step} | {r.bytes_up:,} | {r.bytes_down:,} | {r.seconds:.2f} |" for r in rows]
            if args.cards and name not in UNTRAINED:
                text = hub.store.content(f"me/{name}")["README.md"].decode()
                # the plot is in the published repo, not beside the saved cards
                kept = "\n".join(line for line in text.splitlines() if not line.startswith("![")) + "\n"
                (args.cards / f"{name}.md").write_text(kept, encoding="utf-8")
        print("\n| model | step | bytes up | bytes down | seconds |\n|---|---|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
