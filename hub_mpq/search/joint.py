"""Train the indicators of a model: on a copy, so that the model itself stays float."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..spec import Candidates, Indicators, LayerGraph
from ..train.batch import forward, labels_of, to_device
from ..train.finetune import Finetune
from ..train.loop import fit, make_accelerator
from .limpq import LIMPQ

PRESETS: dict[str, dict[str, Any]] = {
    # [ours] for runs of tens to thousands of steps
    "short": {"optimizer": "adam", "lr": 1e-4, "scale_lr": 1e-2, "weight_decay": 0.0, "log": True},
    # the LIMPQ authors', for ImageNet-sized runs
    "authors": {"optimizer": "sgd", "lr": 1e-2, "scale_lr": 1e-2, "weight_decay": 2.5e-5, "log": False},
}


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader; InvalidArgument when there is none."""
    for batch in loader:
        return batch
    raise InvalidArgument("the data loader is empty")


def train_indicators(
    model: nn.Module,
    graph: LayerGraph,
    norms: Mapping[str, str],
    loader: Iterable[Any],
    candidates: Mapping[str, Candidates],
    *,
    epochs: float = 1,
    steps: int | None = None,
    share: float = 1.0,
    preset: str = "short",
    lr: float | None = None,
    scale_lr: float | None = None,
    smoothing: float = 0.1,
    distill: float | None = None,
    freeze_weights: bool = False,
    uniform: bool = True,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> Indicators:
    """Joint training of all scales (LIMPQ §3.3) on a copy of `model`; returns their final values.

    norms: {BatchNorm: layer whose output it reads}. distill: weight of the distillation loss from the float model;
    None: 1 for batches without labels, 0 for labelled ones. freeze_weights: only scales and norms learn.
    uniform: False trains by random passes alone (an ablation). preset: "short" or "authors". steps=0: untrained scales.
    """
    if preset not in PRESETS:
        raise InvalidArgument(f"preset is one of {', '.join(sorted(PRESETS))}, not {preset!r}")
    chosen = {**PRESETS[preset]}
    chosen.update({k: v for k, v in {"lr": lr, "scale_lr": scale_lr}.items() if v is not None})
    batch = first_batch(loader)
    if distill is None:
        distill = 1.0 if labels_of(batch) is None else 0.0
    accelerator = make_accelerator()
    teacher = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False) if distill else None
    student = copy.deepcopy(model).requires_grad_(True).to(accelerator.device)
    loss = Finetune(
        lr=chosen["lr"],
        scale_lr=chosen["scale_lr"],
        weight_decay=chosen["weight_decay"],
        smoothing=smoothing,
        teacher=teacher,
        distill=distill,
    )
    strategy = LIMPQ(
        loss, scale_lr=chosen["scale_lr"], freeze_weights=freeze_weights, uniform=uniform, log=chosen["log"]
    )
    strategy.attach(student, graph, candidates, norms)
    calibrate_weights(student, mse=False)
    with torch.no_grad():
        samples = sample_inputs(student, [to_device(batch, accelerator.device)], forward)
    calibrate_inputs(student, samples, mse=False)
    provenance = {"preset": preset, "seed": seed, "optimizer": chosen["optimizer"], "lr": chosen["lr"]}
    provenance |= {"scale_lr": chosen["scale_lr"], "distill": distill, "freeze_weights": freeze_weights}
    if steps != 0:
        log = fit(
            student,
            strategy,
            loader,
            epochs=epochs,
            steps=steps,
            share=share,
            optimizer=chosen["optimizer"],
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
            label="indicators",
            accelerator=accelerator,
        )
        provenance |= {"steps": log.steps, "samples": log.samples, "seconds": round(log.seconds, 3)}
        provenance |= {"step_seconds": round(log.step_seconds, 4)}
        provenance |= {"epoch_loss": [round(x, 5) for x in log.epoch_loss]}
    else:
        provenance |= {"steps": 0}
    return strategy.indicators(provenance)
