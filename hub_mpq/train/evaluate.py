"""Evaluate a model: the metrics of its task, or its fidelity to the float model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

from ..errors import HubMPQError, InvalidArgument
from ..nn.types import device_of
from ..tasks import Task, TaskLike, task_of, to_device
from ..tasks.batch import evaluating
from ..tasks.task import Sums
from .batches import has_length
from .processes import each, own_share, raise_together, total, world
from .random_draws import fixed_draws

Figures = dict[str, Any]
"""`{metric: value}`, with "task" and "samples"."""


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    task: TaskLike = None,
    example: Any = None,
) -> Figures:
    """Compute metrics over all items of a loader.

    If several processes were launched, all of them must call it: each evaluates its part, and all return the metrics of
    the whole.

    Args:
        model: The network.
        loader: Batches. With labels, the metrics are those of the task. Without, they are `fidelity_db`, the
            signal-to-noise ratio of all outputs against those of the reference in dB, and for classes `kl` in nats and
            `agreement` of the arg max.
        reference: The float network, for batches without labels.
        task: Task of the model; None to infer it from the model and the first batch.
        example: One input as the network takes it, which tells how many inputs a batch has.

    Returns:
        The metrics, in percent where they are proportions, the task's name as "task", and the number of "samples".

    Raises:
        InvalidArgument: The loader is empty, all labels are ignored, there are neither labels nor a reference, only
            some batches have labels, or the labels fit no task or several.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.train import evaluate
        >>> model = HubMPQ.from_pretrained("test_resnet", pretrained=False).model
        >>> batch = (torch.zeros(2, 3, 160, 160), torch.tensor([0, 1]))
        >>> found = evaluate(model, [batch])
        >>> found["task"], found["samples"]
        ('classification', 2.0)
    """
    from huggingface_hub.utils import tqdm

    device = device_of(model)
    sums: Sums = {}
    samples = 0.0
    known: Task | None = None
    labelled: bool | None = None
    # made in every process, also in one without a batch: its metrics need all processes
    whole = task_of(task, model, example=example).whole()
    failed: HubMPQError | None = None
    try:
        with evaluating(model):
            mine = iter(own_share(loader) if world()[1] > 1 else loader)  # alone, the order does not matter
            first = next(mine, None)
            if first is not None:
                known = task_of(task, model, first, example)
                length = len(loader) if has_length(loader) and world()[1] == 1 else None  # type: ignore[arg-type]
                shown: dict[str, Any] = {"desc": "evaluate", "unit": "batch", "total": length, "leave": False}
                batches = tqdm(chain([first], mine), disable=True if world()[0] else None, **shown)
                for i, batch in enumerate(batches):
                    batch = to_device(batch, device)
                    if labelled is not None and labelled != (known.labels(batch) is not None):
                        raise InvalidArgument(
                            "either all batches or none must have labels; evaluate labelled and unlabelled batches "
                            "separately"
                        )
                    labelled = known.labels(batch) is not None
                    for name, (value, count) in measure(known, model, batch, reference, i, whole).items():
                        before = sums.get(name, (0.0, 0.0))
                        sums[name] = (before[0] + value, before[1] + count)
                    samples += known.samples(batch)
    except HubMPQError as error:
        failed = error
    raise_together(failed)
    if world()[1] > 1:
        names = sorted({name for found in each(sorted(sums)) for name in found})
        flat = [x for name in names for x in sums.get(name, (0.0, 0.0))]
        samples, *flat = total(samples, *flat)
        sums = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(names)}
    if not samples:
        raise InvalidArgument("the data loader is empty")
    found: Figures | None = None if known is None else {"task": known.name, **known.figures(sums)}
    if world()[1] > 1:  # a process without a batch has no task; all have the same sums
        found = next(figures for figures in each(found) if figures is not None)
    if found is None or len(found) < 2:
        raise InvalidArgument("all labels equal the task's ignore_index; at least one label must count")
    if whole is not None and "loss" in found:
        found |= whole.compute()
    return {**found, "samples": float(samples)}


def measure(
    task: Task, model: nn.Module, batch: Any, reference: nn.Module | None, seed: int = 0, whole: Any = None
) -> Sums:
    """Compute the sums of the metrics over one batch.

    Args:
        task: Task of the model.
        model: The network.
        batch: The batch, on its device.
        reference: The float network, for a batch without labels.
        seed: Seed of the random numbers that the model, and likewise the reference, draws in its forward.
        whole: Metrics of all data together, as returned by `Task.whole`.

    Returns:
        `{metric: (sum, count)}`.
    """
    labels = task.labels(batch)
    device = device_of(model)
    with fixed_draws(device, seed):
        output = task.forward(model, batch, labelled=labels is not None)
    if labels is not None:
        if whole is not None:
            whole.update(output, labels)
        return task.metrics(output, labels, task.samples(batch))
    if reference is None:
        raise InvalidArgument(
            "the batches have no labels, and there is no float model to compare with; give batches with labels"
        )
    with fixed_draws(device, seed):
        wanted = task.forward(reference, batch)
    return task.fidelity(output, wanted, task.mask(batch))
