"""Train the indicators of a model: on a copy, so that the model itself stays float."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from ..core import Candidates, Indicators, LayerGraph
from ..errors import InvalidArgument
from ..nn.calibrate import sample_inputs
from ..train.batch import forward, labels_of, to_device
from ..train.engine import Engine
from ..train.finetune import Finetune
from ..train.loop import fit
from ..train.processes import least, mean_rows, own_share, raise_together, share_samples
from .limpq import LIMPQ

PRESETS: dict[str, dict[str, Any]] = {
    # [ours] for runs of tens to thousands of steps
    "short": {
        **{"optimizer": "adam", "lr": 1e-4, "scale_lr": 1e-2, "weight_decay": 0.0, "log": True, "indicator": "loss"}
    },
    # the LIMPQ authors', for ImageNet-sized runs
    "authors": {
        **{"optimizer": "sgd", "lr": 1e-2, "scale_lr": 1e-2, "weight_decay": 2.5e-5, "log": False, "indicator": "scale"}
    },
}


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader; InvalidArgument when there is none."""
    for batch in loader:
        return batch
    raise InvalidArgument("the data loader is empty")


def first_batches(loader: Iterable[Any], count: int, accelerator: Any, seed: int) -> list[Any]:
    """This process's first `count` batches on its device; InvalidArgument in all processes when one has none."""
    found = [to_device(batch, accelerator.device) for batch in islice(iter(own_share(loader, seed=seed)), count)]
    raise_together(None if found else InvalidArgument("the data loader is empty"))
    return found[: least(len(found))]  # as many in each, so that what is averaged weighs the same


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
    indicator: str | None = None,
    granularity: str | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    engine: Engine | None = None,
) -> Indicators:
    """Joint training of all scales (LIMPQ §3.3) on a copy of `model`; returns what it says of every layer and width.

    norms: {BatchNorm: layer whose output it reads}. distill: weight of the distillation loss from the float model;
    None: 1 for batches without labels, 0 for labelled ones. freeze_weights: only scales and norms learn.
    uniform: False trains by random passes alone (an ablation). indicator: "loss" or "scale" (see LIMPQ), None: the
    preset's. granularity: "tensor" or "channel" for the weight scales, None: the indicator's. preset: "short" (ours) or
    "authors". steps=0: untrained scales. engine: precision, memory, trackers.

    Launched as several processes, each takes its part of the batches; starts, gradients and what is read out are
    averaged over them, so that all return the same indicators.
    """
    engine = engine or Engine()
    if preset not in PRESETS:
        raise InvalidArgument(f"preset is one of {', '.join(sorted(PRESETS))}, not {preset!r}")
    chosen = {**PRESETS[preset]}
    chosen.update({k: v for k, v in {"lr": lr, "scale_lr": scale_lr, "indicator": indicator}.items() if v is not None})
    accelerator = engine.accelerator("indicators", seed=seed)
    batches = first_batches(loader, LIMPQ.batches, accelerator, seed)
    if distill is None:
        distill = 1.0 if labels_of(batches[0]) is None else 0.0
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
        loss,
        scale_lr=chosen["scale_lr"],
        freeze_weights=freeze_weights,
        uniform=uniform,
        log=chosen["log"],
        indicator=chosen["indicator"],
        granularity=granularity,
    )
    strategy.attach(student, graph, candidates, norms)
    strategy.calibrate(student, batches, share_samples(sample_inputs(student, batches, forward)))
    provenance = {"preset": preset, "seed": seed, "optimizer": chosen["optimizer"], "lr": chosen["lr"]}
    provenance |= {"scale_lr": chosen["scale_lr"], "distill": distill, "freeze_weights": freeze_weights}
    provenance |= {"processes": accelerator.num_processes}
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
            engine=engine,
        )
        provenance |= {"steps": log.steps, "samples": log.samples, "seconds": round(log.seconds, 3)}
        provenance |= {"step_seconds": round(log.step_seconds, 4)}
        provenance |= {"epoch_loss": [round(x, 5) for x in log.epoch_loss]}
    else:
        provenance |= {"steps": 0}
    strategy.read_out(student, batches)
    if strategy.indicator == "loss":
        strategy.growth = (mean_rows(strategy.growth[0]), mean_rows(strategy.growth[1]))
    return strategy.indicators(provenance)
