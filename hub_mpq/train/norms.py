"""Re-estimate BatchNorm statistics: quantized activations have other means and variances than float ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from ..tasks import TaskLike, task_of, to_device
from .processes import world


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, limit: int = 32, task: TaskLike = None, example: Any = None
) -> int:
    """Replace running statistics by their plain average over up to `limit` batches (of each process, where there are
    several); returns how many were used.

    A folded BatchNorm (identity statistics of a model whose convolutions hold the affine part) must not be
    re-estimated: such a norm has mean 0 and variance 1 throughout and is left alone.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and not is_folded(m)
    ]
    if not norms or first is None:
        return 0
    kept = [(m.momentum, m.training) for m in norms]
    training = model.training
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    used = 0
    known = task_of(task, model, example=example)
    try:
        for batch in chain([first], islice(iterator, limit - 1)):
            known.forward(model, to_device(batch, next(model.parameters()).device))
            used += 1
    finally:
        for norm, (momentum, _) in zip(norms, kept, strict=True):
            norm.momentum = momentum
        model.train(training)
        for norm, (_, was) in zip(norms, kept, strict=True):
            norm.training = was
    if world()[1] > 1:
        from accelerate.utils import reduce

        for norm in norms:
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(reduce(getattr(norm, name), "mean"))
    return used


def is_folded(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether statistics say nothing: mean 0 and variance 1 (within float noise) in every channel."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return False
    return bool((mean.abs() < 1e-6).all() and ((var - 1).abs() < 2e-3).all())
