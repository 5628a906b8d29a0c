"""Fine-tune a quantized model, the whole recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .batch import labels_of
from .cpt import CyclicPrecision, check_cycles
from .engine import Engine
from .finetune import Finetune
from .gradient_quantizers import GradientQuantization, check_kind
from .loop import TrainLog, fit
from .norms import reestimate_batch_norm
from .processes import own_share


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: float = 1,
    steps: int | None = None,
    optimizer: str = "adam",
    lr: float = 1e-4,
    scale_lr: float = 1e-3,
    weight_decay: float = 1e-5,
    smoothing: float = 0.1,
    distill: float | None = None,
    ema: float | None = None,
    reestimate_norms: bool = True,
    cyclic_bits: int | None = None,
    cycles: int = 8,
    gradient_bits: int | None = None,
    gradient_quantizer: str = "sample",
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    engine: Engine | None = None,
) -> TrainLog:
    """Train weights and scales of a quantized `model` in place: cosine schedule, label smoothing.

    distill: weight in [0, 1] of the distillation loss from `teacher` (the float model); None: 1 for batches without
    labels, else 0. ema: decay of an average of the weights that replaces them at the end. reestimate_norms:
    re-estimate BatchNorm statistics on up to 32 batches afterwards. lr, scale_lr: of weights, of log scales.
    cyclic_bits: widths cycle `cycles` times between it and the policy's (CPT). gradient_bits: the backward pass runs
    on gradients of so many bits, by the "tensor", "sample" or "householder" quantizer (fully quantized training).
    engine: precision, memory, compiler, trackers.
    """
    # wrong values of options that nothing uses yet are mistakes too
    check_cycles(cycles)
    check_kind(gradient_quantizer)
    first = next(iter(train), None)
    if first is None:
        raise InvalidArgument("the data loader is empty")
    if distill is None:
        distill = 1.0 if labels_of(first) is None else 0.0
    if not 0 <= distill <= 1:
        raise InvalidArgument(f"distill is a weight from 0 to 1, not {distill}")
    if distill and teacher is None:
        raise InvalidArgument("distillation needs the float model, which a model loaded from packed weights lacks")
    engine = engine or Engine()
    if engine.fsdp:
        raise InvalidArgument("fsdp trains indicators; fine-tuning packs whole weights and runs without it")
    accelerator = engine.accelerator("fine-tune", seed=seed)
    if teacher is not None and distill:
        teacher = teacher.to(accelerator.device).eval()
    average = None
    if ema is not None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        model.to(accelerator.device)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
    cyclic = None if cyclic_bits is None else CyclicPrecision(model, cyclic_bits, cycles)
    gradients = None if gradient_bits is None else GradientQuantization(model, gradient_bits, gradient_quantizer, seed)
    hooks = Finetune(
        lr=lr,
        scale_lr=scale_lr,
        weight_decay=weight_decay,
        smoothing=smoothing,
        teacher=teacher if distill else None,
        distill=distill,
        average=average,
        cyclic=cyclic,
        gradients=gradients,
    )
    try:
        log = fit(
            model,
            hooks,
            train,
            epochs=epochs,
            steps=steps,
            optimizer=optimizer,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
            label="fine-tune",
            accelerator=accelerator,
            engine=engine,
        )
    finally:
        for schedule in (cyclic, gradients):
            if schedule is not None:
                schedule.release()
    if average is not None:
        with torch.no_grad():
            # no integers: an average of a constant zero point can drift by one
            found = average.module.state_dict()
            model.load_state_dict({k: v for k, v in found.items() if v.is_floating_point()}, strict=False)
    if reestimate_norms:
        reestimate_batch_norm(model, own_share(train, seed=seed))
    model.eval()
    return log
