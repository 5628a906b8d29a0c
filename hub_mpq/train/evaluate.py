"""Measure a model: the metrics of its task, or fidelity to the float model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..errors import HubMPQError, InvalidArgument
from ..tasks import Task, TaskLike, task_of, to_device
from ..tasks.batch import size_of
from ..tasks.task import Sums
from .processes import each, own_share, raise_together, total, world
from .random_draws import fixed_draws

Figures = dict[str, Any]
"""{metric: value}, with "task" and "samples"."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    task: TaskLike = None,
    example: Any = None,
) -> Figures:
    """Metrics over all items of `loader`, in percent where they are shares.

    Launched as several processes, all must call it; each measures its part and all get the figures of the whole.

    Args:
        model: The network.
        loader: Batches. With labels: the task's metrics. Without: `fidelity_db`, the signal-to-noise ratio of all
            outputs against the reference's, and for classes `kl` and `agreement` of the arg max.
        reference: The float network, for batches without labels.
        task: What the model is for; None to find out from it and the first batch.
        example: One input as the network takes it, which says how many inputs a batch has.

    Returns:
        The metrics, the task's name as "task", and the number of "samples".

    Raises:
        InvalidArgument: An empty loader, no label that counts, neither labels nor a reference, labels that fit no task
            or several.
    """
    from huggingface_hub.utils import tqdm

    training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: Sums = {}
    samples = 0.0
    known: Task | None = None
    whole: Any = None
    failed: HubMPQError | None = None
    try:
        mine = iter(own_share(loader) if world()[1] > 1 else loader)  # alone, the order does not matter
        first = next(mine, None)
        if first is not None:
            known = task_of(task, model, first, example)
            whole = known.whole()
            batches = tqdm(
                chain([first], mine),
                total=len(loader) if hasattr(loader, "__len__") and world()[1] == 1 else None,
                desc="evaluate",
                unit="batch",
                leave=False,
                disable=True if world()[0] else None,
            )
            for i, batch in enumerate(batches):
                batch = to_device(batch, device)
                for name, (value, count) in measure(known, model, batch, reference, i, whole).items():
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = (before[0] + value, before[1] + count)
                samples += size_of(batch)
    except HubMPQError as error:
        failed = error
    finally:
        model.train(training)
    raise_together(failed)
    if world()[1] > 1:
        names = sorted({name for found in each(sorted(sums)) for name in found})
        flat = [x for name in names for x in sums.get(name, (0.0, 0.0))]
        samples, *flat = total(samples, *flat)
        sums = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}
        known = known or task_of(task, model, example=example)
    if not samples or known is None:
        raise InvalidArgument("the data loader is empty")
    figures = known.figures(sums)
    if whole is not None and "loss" in figures:
        figures |= whole.compute()
    if not figures:
        raise InvalidArgument(f"no label counts: all of them are {known.ignore_index} (ignore_index)")
    return {"task": known.name, **figures, "samples": float(samples)}


def measure(
    task: Task, model: nn.Module, batch: Any, reference: nn.Module | None, seed: int = 0, whole: Any = None
) -> Sums:
    """{metric: (sum, count)} of one batch. A model that draws random numbers in its forward draws those of `seed`, and
    so does the reference. whole: as `Task.whole` gave it."""
    labels = task.labels(batch)
    device = next(model.parameters()).device
    with fixed_draws(device, seed):
        output = task.forward(model, batch, labelled=labels is not None)
    if labels is not None:
        if whole is not None:
            whole.update(output, labels)
        return task.metrics(output, labels)
    if reference is None:
        raise InvalidArgument("the batches have no labels: accuracy cannot be measured, only fidelity to a float model")
    with fixed_draws(device, seed):
        wanted = task.forward(reference, batch)
    return task.fidelity(output, wanted, task.mask(batch))
